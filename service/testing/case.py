"""One strategy under examination: found, configured for a tiny model, planned and loaded.

What the checks share is done once and kept: the plan for this machine, the loaded model, the
logits of plain transformers.
"""

import contextlib
import gc
import inspect
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from service.config.origin import Origin
from service.config.schema import ModelConfig
from service.config.suggesting import did_you_mean
from service.errors import ConfigError
from service.errors import DoesNotFit
from service.errors import PlacementUnavailable
from service.errors import PluginError
from service.errors import ServiceError
from service.placement import registry
from service.placement.hardware import GIB
from service.placement.hardware import Hardware
from service.placement.plan import Placement
from service.placement.registry import Strategy
from service.testing import machines

if TYPE_CHECKING:
    from service.placement.loading import Loaded

_SERVICE = Path(__file__).resolve().parents[1]
LAYERS = 4
# small enough that 4 bits say nearly what 32 say, large enough that every weight counts
INITIALIZER_RANGE = 0.05


class UnknownStrategy(LookupError):
    """There is no strategy of that name, and no such file."""


class UnknownModel(LookupError):
    """There is no such folder with a model, and no tiny model of that architecture."""


class NotRun(Exception):
    """A check cannot be run here; the text says why."""


def find(name_or_file: str, strategy_dirs: Sequence[Path] = ()) -> Strategy:
    """The strategy in a file ("mine.py"), or the installed one of that name.

    Raises UnknownStrategy, or the PluginError of a strategy that is broken.
    """
    path = Path(name_or_file)
    if path.suffix != ".py":
        return _named(name_or_file, registry.build(strategy_dirs))
    if not path.is_file():
        raise UnknownStrategy(f"there is no file {name_or_file}")
    path = path.resolve()
    if path.parent == _SERVICE.parent / "plugins":
        return _named(path.stem.replace("_", "-"), registry.build())
    found = registry.build(files=[path])
    return _named(next(n for n, where in found.sources.items() if str(path) in where), found)


def small_model(folder_or_architecture: str, workspace: Path) -> Path:
    """The folder of that model; one of ours, in float32, is written into `workspace`.

    Raises UnknownModel.
    """
    folder = Path(folder_or_architecture)
    if (folder / "config.json").is_file():
        return folder.resolve()
    from service.placement import guard
    from service.placement import loading
    from service.testing import tiny

    known = (*tiny.ARCHITECTURES, *tiny.MIXTURES)
    if folder_or_architecture not in known:
        maybe = did_you_mean(folder_or_architecture, known)
        raise UnknownModel(
            f"{folder_or_architecture} is no folder with a config.json, and no tiny model{maybe}; "
            f"there is {', '.join(known)}"
        )
    with guard.LOAD_LOCK, loading.observed(lambda share: None):  # without its progress bar
        return tiny.save_tiny(
            workspace / "model",
            folder_or_architecture,
            layers=LAYERS,
            initializer_range=INITIALIZER_RANGE,
        )


def _named(name: str, found: registry.Registry) -> Strategy:
    if name not in found.sources:
        known = sorted(found.sources)
        raise UnknownStrategy(
            f"there is no strategy {name!r}{did_you_mean(name, known)}; there is {', '.join(known)}"
        )
    return found.select(name)


class Case:
    """A strategy, the deployment it gets and the machine it is for.

    workspace: an empty folder for model files and offloaded weights. hardware: where the model is
    loaded; this machine if None. settings: keys of the deployment, such as `quantize` or
    `options`, as an operator would write them.
    """

    def __init__(
        self,
        strategy: Strategy,
        workspace: Path,
        *,
        model: Path | None = None,
        hardware: Hardware | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.strategy = strategy
        self.workspace = workspace
        self.settings = dict(settings or {})
        self._model = model
        self._hardware = hardware
        self._loaded: Loaded | None = None
        self._failure: ServiceError | None = None
        self.unfit: str | None = None  # why it must not be loaded again

    @property
    def brought(self) -> bool:
        """Whether the model is the author's own."""
        return self._model is not None

    @cached_property
    def folder(self) -> Path:
        """The model's files: a tiny Llama in float32 unless the author gave his own."""
        if self._model is not None:
            return self._model
        return small_model("llama", self.workspace)

    @cached_property
    def hardware(self) -> Hardware:
        from service.placement import hardware

        return self._hardware or hardware.detect(self.workspace)

    @cached_property
    def config(self) -> ModelConfig:
        return self.configured(self.folder)

    def configured(self, folder: Path) -> ModelConfig:
        """What the hooks get, for a model in `folder`. Raises NotRun for options it must be told.

        Whatever `settings` has counts as the operator's word, above the strategy's own DEFAULTS.
        """
        keys: dict[str, Any] = {
            "deployment": "contract",
            "model_id": "tiny",
            "model": str(folder),
            "folder": folder,
            "strategy": self.strategy.name,
            "offload_folder": self.workspace / "offload",
            "max_context": 64,
            "max_sequences": 1,
            **self.settings,
        }
        said = dict.fromkeys(self.settings, Origin("flag", "--set"))
        try:
            return registry.settle(ModelConfig(**keys), self.strategy, said)
        except ConfigError as error:
            raise NotRun(f"options are needed: {error.problems[0].headline()}") from None

    @cached_property
    def machines(self) -> tuple[Hardware, ...]:
        """Where a plan is tried, this machine first."""
        many = machines.cards(24 * GIB, 24 * GIB)
        return (self.hardware, many, machines.ram(64 * GIB))

    def planned_somewhere(self, config: ModelConfig) -> tuple[Hardware, Placement]:
        """The first machine that the strategy accepts, and its plan for it.

        Raises what it says of the last one if it accepts none.
        """
        refused: ServiceError | None = None
        for hardware in self.machines:
            try:
                return hardware, self.strategy.plan(config, hardware)
            except (PlacementUnavailable, DoesNotFit) as error:
                refused = refused or error
        raise PluginError(
            "plan refuses this machine, one with two GPUs of 24 GiB and one with 64 GiB of RAM "
            f"({self.at('plan')}): {refused and refused.message}",
            hint="a model of a megabyte must fit somewhere",
        )

    @property
    def placement(self) -> Placement:
        """The plan for `hardware`. Raises NotRun if the strategy cannot use this machine."""
        try:
            return self.strategy.plan(self.config, self.hardware)
        except (PlacementUnavailable, DoesNotFit) as error:
            raise NotRun(f"not on this machine: {error.message}") from None
        except ServiceError:
            raise NotRun("plan fails: see plan-reads-no-weights") from None

    def load(self) -> "Loaded":
        """Load the model anew, as the service does. Raises what `loading.load` raises, NotRun."""
        from service.placement import loading

        placement = self.placement
        return loading.load(self.strategy, self.config, placement, lambda share: None)

    def loaded(self) -> "Loaded":
        """The model, loaded once for all checks. Raises NotRun if it cannot be."""
        if self.unfit is not None:
            raise NotRun(self.unfit)
        if self._failure is None and self._loaded is None:
            try:
                self._loaded = self.load()
            except ServiceError as error:
                self._failure = error.bare()
        if self._loaded is None:
            raise NotRun("there is no model: see load-returns-a-model")
        return self._loaded

    def failure(self) -> ServiceError | None:
        """What the load raised. Raises NotRun if this machine is not for the strategy."""
        try:
            self.loaded()
        except NotRun:
            if self._failure is None:
                raise
        return self._failure

    def drop(self) -> None:
        """Release the loaded model, if there is one, and forget it."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            with contextlib.suppress(ServiceError):  # the check of release reports it
                self.strategy.release(loaded.model)
            del loaded
            gc.collect()

    # --- the author's files

    def function(self, hook: str) -> Any:
        """The author's function for a hook, or the default's."""
        caller = self.strategy.hooks[hook]
        implementations: list[Any] = getattr(caller, "get_hookimpls", list)()
        found = implementations[-1].function if implementations else caller
        return inspect.unwrap(found)

    def at(self, hook: str) -> str:
        """Where a hook is written: "plan, mine.py:12"."""
        code = getattr(self.function(hook), "__code__", None)
        if code is None or not self.is_author(code.co_filename):
            return f"{hook}, {self.strategy.source}"
        try:
            lines, first = inspect.getsourcelines(code)
        except OSError:
            lines, first = [], code.co_firstlineno
        down = next((n for n, text in enumerate(lines) if text.lstrip().startswith("def ")), 0)
        return f"{hook}, {Path(code.co_filename).name}:{first + down}"

    @cached_property
    def is_author(self) -> Callable[[str], bool]:
        """Whether a file is the author's: those of the hooks, and all of their package."""
        files: set[str] = set()
        folders: set[Path] = set()
        for hook in self.strategy.hooks:
            function = self.function(hook)
            code = getattr(function, "__code__", None)
            if code is None or Path(code.co_filename).is_relative_to(_SERVICE):
                continue
            files.add(code.co_filename)
            package = getattr(function, "__globals__", {}).get("__package__")
            if package and package != "plugins":
                folders.add(Path(code.co_filename).parent)

        def author(file: str) -> bool:
            return file in files or any(Path(file).is_relative_to(folder) for folder in folders)

        return author

    def holder(self, model: object) -> str | None:
        """The global of the author's module that holds the model: "KEPT in mine.py"."""
        for hook in self.strategy.hooks:
            function = self.function(hook)
            variables: Mapping[str, Any] = getattr(function, "__globals__", {})
            for name, value in variables.items():
                inside = value.values() if isinstance(value, dict) else value
                holds = isinstance(inside, list | tuple | set | type({}.values())) and any(
                    item is model for item in inside
                )
                if value is model or holds:
                    return f"{name} in {Path(variables.get('__file__', '?')).name}"
        return None
