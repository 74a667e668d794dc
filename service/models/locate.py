"""`model:` of a deployment -> the folder it means, checked.

In this order: a name of the catalogue; SOURCE:FILE.gguf or a path to a GGUF file; a folder; a hub
id[@revision]. A folder that is called like a catalogue model is written ./NAME.
"""

import difflib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from pathlib import PurePosixPath

from service.config.schema import Config
from service.config.schema import ModelConfig
from service.errors import ModelUnavailable
from service.models import fetch
from service.models import folder as model_folder
from service.models import gguf_file
from service.models import hub
from service.models.catalogue import CATALOGUE

Report = Callable[[str, float], None]


def _say_nothing(stage: str, fraction: float) -> None:
    """For callers that show no progress."""


def locate(config: Config, report: Report = _say_nothing) -> ModelConfig:
    """Find the model's files, downloading them if they are not here, and check them.

    `report` hears what is being done and how much of it is done (0 to 1). Raises ModelUnavailable.
    """
    words = config.deployment.model
    if words in CATALOGUE:
        return _located(config, words, _from_catalogue(words, config.cache, report))
    source, file = _split_gguf(words)
    if file is not None:
        return _gguf(config, source, file, report)
    if _means_folder(words):
        found = _folder(words)
        _check(found, config)
        return _located(config, found.resolve().name, found)
    repo, revision = _hub_id(config, words)
    return _located(config, repo, _from_hub(config, repo, revision, report))


def locate_for_plan(config: Config, report: Report = _say_nothing) -> ModelConfig:
    """As `locate`, but config.json is enough: nothing large is downloaded.

    The exception is a GGUF file on the hub, whose configuration is inside the file. Raises
    ModelUnavailable.
    """
    words = config.deployment.model
    if words in CATALOGUE:
        here = fetch.is_here(words, config.cache)
        folder = fetch.path_of(words, config.cache) if here else _config_of(words, config.cache)
        model_folder.check_config(folder)
        return _located(config, words, folder)
    if _split_gguf(words)[1] is not None:
        return locate(config, report)
    if _means_folder(words):
        folder = _folder(words)
        model_folder.check_config(folder, trust_remote_code=config.deployment.trust_remote_code)
        return _located(config, folder.resolve().name, folder)
    repo, revision = _hub_id(config, words)
    folder = hub.snapshot(repo, revision, hub.CONFIG_ONLY, report)
    model_folder.check_config(folder, trust_remote_code=config.deployment.trust_remote_code)
    return _located(config, repo, folder)


def _located(
    config: Config, model_id: str, folder: Path, gguf_file: str | None = None
) -> ModelConfig:
    keys = dict(config.deployment)
    if keys["offload_folder"] is None:
        keys["offload_folder"] = config.cache / "offload" / config.name
    return ModelConfig(
        **keys,
        deployment=config.name,
        model_id=model_id,
        folder=folder,
        gguf_file=gguf_file,
    )


def _check(folder: Path, config: Config) -> None:
    model_folder.check(
        folder,
        allow_pickle=config.deployment.allow_pickle,
        trust_remote_code=config.deployment.trust_remote_code,
    )


def _from_catalogue(name: str, cache: Path, report: Report) -> Path:
    if not fetch.is_here(name, cache):
        return fetch.fetch(name, cache, report)
    folder = fetch.path_of(name, cache)
    try:
        model_folder.check(folder)
    except ModelUnavailable as error:
        raise ModelUnavailable(
            error.message, hint=f"repair it: moorage model fetch {name}"
        ) from None
    return folder


def _config_of(name: str, cache: Path) -> Path:
    """A folder with the config.json of a catalogue model that has not been fetched."""
    folder = cache / "configs" / name
    text = json.dumps(dict(CATALOGUE[name].config), indent=2) + "\n"
    path = folder / "config.json"
    try:
        if path.is_file() and path.read_text() == text:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise ModelUnavailable(
            f"cannot write to the cache {folder}: {error.strerror or error}",
            hint="make it writable, or set MOORAGE_CACHE to a folder that is",
        ) from None
    return folder


def _split_gguf(words: str) -> tuple[str, str | None]:
    """ "SOURCE:FILE.gguf" or "FOLDER/FILE.gguf" in two; anything else with None."""
    if not words.endswith(".gguf"):
        return words, None
    source, colon, file = words.rpartition(":")
    if colon:
        return source, file
    path = Path(words)
    return str(path.parent) if path.parent.parts else ".", path.name


def _gguf(config: Config, source: str, file: str, report: Report) -> ModelConfig:
    pure = PurePosixPath(file)
    if not source or pure.is_absolute() or ".." in pure.parts:
        raise ModelUnavailable(
            f"{config.deployment.model!r} does not name a file inside a folder or repository",
            hint="write FOLDER:FILE.gguf or OWNER/NAME:FILE.gguf",
        )
    repo, _, revision = source.partition("@")
    if _folder(source).is_dir() or not hub.is_id(repo):
        folder = _folder(source)
        if not folder.is_dir():
            raise _no_folder(folder, source)
        model_id = PurePosixPath(file).stem
    else:
        patterns = (file, *hub.WITHOUT_WEIGHTS)
        folder, model_id = hub.snapshot(repo, revision or None, patterns, report), f"{repo}:{file}"
    if not (folder / file).is_file():
        others = sorted(path.name for path in folder.glob("*.gguf"))
        raise ModelUnavailable(
            f"{folder}: has no {file}",
            hint=f"it has {', '.join(others)}" if others else "check the file's name",
        )
    gguf_file.read(folder / file)
    return _located(config, model_id, folder, file)


def _means_folder(words: str) -> bool:
    return words.startswith((".", "/", "~")) or _folder(words).is_dir()


def _folder(words: str) -> Path:
    """The folder the words may mean. Relative ones were made absolute where the config was read."""
    path = Path(words).expanduser()
    if not path.is_dir() and words.startswith((".", "/", "~")) and not words.endswith(".gguf"):
        raise _no_folder(path, words)
    return path


def _no_folder(path: Path, words: str) -> ModelUnavailable:
    if path.exists():
        return ModelUnavailable(
            f"{path}: is not a folder", hint="give the folder, not a file in it"
        )
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return ModelUnavailable(
        f"{path}: no such folder",
        hint=f"did you mean {path.parent / close[0]}?" if close else f"check model: {words}",
    )


def _hub_id(config: Config, words: str) -> tuple[str, str | None]:
    repo, at, revision = words.partition("@")
    if hub.is_id(repo) and (revision or not at):
        return repo, revision or None
    close = difflib.get_close_matches(words.lower(), CATALOGUE, n=1, cutoff=0.5)
    maybe = f"did you mean {close[0]!r}? " if close else ""
    raise ModelUnavailable(
        f"{words!r} is no model that is known here, no folder, and no hub id",
        hint=f"{maybe}known: {', '.join(CATALOGUE)}; a folder is written ./folder, "
        "a hub id OWNER/NAME[@REVISION]",
    )


def _from_hub(config: Config, repo: str, revision: str | None, report: Report) -> Path:
    """The whole repository; pickled weights only if there is nothing else and allowed."""
    code = hub.CODE if config.deployment.trust_remote_code else ()
    folder = hub.snapshot(repo, revision, (*hub.SAFETENSORS, *code), report)
    has_safetensors = any(folder.glob("*.safetensors"))
    if not has_safetensors and config.deployment.allow_pickle:
        folder = hub.snapshot(repo, folder.name, (*hub.PICKLED, *code), report)
    elif not has_safetensors:
        raise ModelUnavailable(
            f"{repo}: has no safetensors weights",
            hint="choose a repository that has them, convert it, or set allow_pickle: true "
            "if you trust it",
        )
    _check(folder, config)
    return folder
