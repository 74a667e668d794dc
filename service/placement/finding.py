"""Find, import and check strategies, before pluggy sees them.

Three sources: the built-in `plugins` folder, installed entry points, and the folders in
`strategy_dirs`. pluggy accepts a class, a misspelt hook or a missing one and fails at the call;
here each is an error with the author's own file and signature.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from pydantic import ValidationError

from service.config.schema import DeploymentConfig
from service.errors import PluginError
from service.placement import hookspecs

STDLIB = ("<frozen", sysconfig.get_paths()["stdlib"])
HOOKS = ("plan", *hookspecs.REQUIRED, "release")
# keys that are used before the strategy is asked for its defaults
DECIDED_BEFORE = frozenset(
    (
        "model",
        "strategy",
        "strategy_dirs",
        "options",
        "fallback",
        "load_timeout_s",
        "trust_remote_code",
        "allow_pickle",
    )
)


@dataclass(frozen=True)
class Found:
    """A strategy before import: the name it would have, where it is, how to get it."""

    name: str
    source: str
    fetch: Callable[[], object]


def find(strategy_dirs: Sequence[Path], files: Sequence[Path] = ()) -> Iterator[Found]:
    """Every strategy there is: built in, installed, in folders, in single files."""
    import plugins

    if plugins.__file__ is None or Path(plugins.__file__).resolve().parents[1] != _home():
        where = plugins.__file__ or ", ".join(plugins.__path__)
        raise PluginError(
            f"another package named 'plugins' hides Moorage's own: {where}",
            hint="rename it, or start Moorage from another folder",
        )
    for path in _strategy_files(Path(plugins.__file__).parent):
        fetch = partial(importlib.import_module, f"plugins.{path.stem}")
        yield Found(_stem(path), f"plugins/{path.name}", fetch)
    for point in sorted(entry_points(group=hookspecs.ENTRY_POINT_GROUP), key=lambda p: p.name):
        package = point.dist.name if point.dist else "?"
        yield Found(point.name, f"{package}: {point.value}", point.load)
    for folder in strategy_dirs:
        if not folder.is_dir():
            raise PluginError(f"strategy_dirs: {folder} is not a folder")
        for path in _strategy_files(folder):
            yield Found(_stem(path), str(path), partial(_import_file, path))
    for path in files:
        yield Found(_stem(path), str(path), partial(_import_file, path))


def _home() -> Path:
    """The folder that holds `service`; our `plugins` lies beside it."""
    return Path(__file__).resolve().parents[2]


def _strategy_files(folder: Path) -> list[Path]:
    """Without what pytest keeps beside them."""
    beside = ("_", "test_", "conftest.")
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith(beside))


def _stem(path: Path) -> str:
    return path.stem.replace("_", "-")


def _import_file(path: Path) -> ModuleType:
    """Import a file that belongs to no package, under a name of its own, once per process and
    content: a reload takes up what was edited.
    """
    digest = hashlib.sha256(bytes(path.resolve()) + b"\0" + path.read_bytes()).hexdigest()[:12]
    name = f"moorage_strategy_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_plugin(found: Found) -> object:
    try:
        return found.fetch()
    except (Exception, SystemExit) as error:  # an import runs the author's code: anything
        raise PluginError(
            f"strategy {found.name} failed to import: {describe(error)}",
            hint=f"see {found.source}",
        ) from error


def describe(error: BaseException) -> str:
    """An exception in one line, with the author's file and line: "ValueError: no (mine.py:12)"."""
    where = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        ours = Path(frame.filename).resolve().is_relative_to(_home() / "service")
        library = "site-packages" in frame.filename or frame.filename.startswith(STDLIB)
        if not ours and not library and "importlib" not in frame.filename:
            where = f" ({Path(frame.filename).name}:{frame.lineno})"
            break
    if isinstance(error, SyntaxError):
        where = f" ({Path(error.filename or '?').name}:{error.lineno})"
        return f"{error.msg}{where}"
    kind = "" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}{where}"


def check(name: str, plugin: object, source: str) -> None:
    """Refuse what pluggy would accept and fail on later. Raises PluginError."""
    if inspect.isclass(plugin):
        raise PluginError(
            f"strategy {name}: {source} is a class",
            hint="register an instance of it, or a module of functions",
        )
    marked = {n: m for n, m in _members(plugin) if getattr(m, f"{hookspecs.PROJECT}_impl", None)}
    for function, member in marked.items():
        if function not in HOOKS:
            guess = difflib.get_close_matches(function, HOOKS, n=1)
            maybe = f"; did you mean '{guess[0]}'?" if guess else f"; hooks are {', '.join(HOOKS)}"
            raise PluginError(f"strategy {name}: there is no hook '{function}'{maybe} ({source})")
        _check_arguments(name, function, member, source)
    for hook in HOOKS:
        member = getattr(plugin, hook, None)
        if hook not in marked and inspect.isroutine(member):
            raise PluginError(
                f"strategy {name}: {hook} is not marked as a hook ({source})",
                hint=f"write @hookimpl above def {hook}",
            )
    missing = [hook for hook in hookspecs.REQUIRED if hook not in marked]
    if missing:
        classes = [n for n, m in _members(plugin) if inspect.isclass(m) and _has_hooks(m)]
        hint = f"class {classes[0]} has hooks: write plain functions" if classes else None
        raise PluginError(f"strategy {name} lacks {', '.join(missing)} ({source})", hint=hint)
    schema = getattr(plugin, "Options", None)
    if schema is not None and not (inspect.isclass(schema) and issubclass(schema, BaseModel)):
        raise PluginError(f"strategy {name}: Options must be a pydantic model ({source})")
    _check_defaults(name, getattr(plugin, "DEFAULTS", {}), source)


def defaults_of(plugin: object) -> Mapping[str, Any]:
    """The DEFAULTS of a plugin that `check` accepted, as the typed values of a deployment."""
    words = dict(getattr(plugin, "DEFAULTS", {}))
    settled = DeploymentConfig.model_validate(words)
    return {key: getattr(settled, key) for key in words}


def _check_defaults(name: str, defaults: object, source: str) -> None:
    possible = [key for key in DeploymentConfig.model_fields if key not in DECIDED_BEFORE]
    if not isinstance(defaults, Mapping) or not set(defaults) <= set(possible):
        wrong = sorted(set(defaults) - set(possible)) if isinstance(defaults, Mapping) else []
        which = f"; {', '.join(map(repr, wrong))} cannot be one" if wrong else ""
        raise PluginError(
            f"strategy {name}: DEFAULTS must map keys of a deployment to values{which} ({source})",
            hint=f"keys are {', '.join(possible)}",
        )
    try:
        DeploymentConfig.model_validate(dict(defaults))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"DEFAULTS[{key!r}] is {first['input']!r:.80}: {first['msg']}"
        raise PluginError(f"strategy {name}: {what} ({source})") from None


def _check_arguments(name: str, hook: str, member: Any, source: str) -> None:
    allowed = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    for argument, parameter in inspect.signature(member).parameters.items():
        if argument in allowed and (
            parameter.kind is not parameter.POSITIONAL_OR_KEYWORD
            or parameter.default is not parameter.empty
        ):
            raise PluginError(
                f"strategy {name}: {hook}{inspect.signature(member)} would never be given "
                f"'{argument}' ({source})",
                hint=f"write it as a plain argument, without a default: {argument}",
            )
        if argument not in allowed:
            guess = difflib.get_close_matches(argument, allowed, n=1)
            maybe = f"; did you mean '{guess[0]}'?" if guess else ""
            raise PluginError(
                f"strategy {name}: {hook}{inspect.signature(member)} asks for '{argument}'; "
                f"the hook offers {', '.join(allowed)}{maybe} ({source})"
            )


def _members(plugin: object) -> Iterator[tuple[str, Any]]:
    """Attributes of a module or instance, without running its properties."""
    for name in dir(plugin):
        if name.startswith("__"):
            continue
        if isinstance(inspect.getattr_static(plugin, name, None), property | cached_property):
            continue
        yield name, getattr(plugin, name, None)


def _has_hooks(cls: type) -> bool:
    return any(getattr(m, f"{hookspecs.PROJECT}_impl", None) for m in vars(cls).values())
