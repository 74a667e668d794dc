"""Strategies: find -> import -> check -> register -> select one.

A strategy that is broken is kept as its error, shown by `moorage plugins` and `moorage doctor`, and
raised only if selected.
"""

import difflib
import inspect
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import TypeVar

import pluggy
from pydantic import BaseModel
from pydantic import ValidationError

from service.config.origin import BUILT_IN
from service.config.origin import Origin
from service.config.schema import DeploymentConfig
from service.config.schema import ModelConfig
from service.errors import ConfigError
from service.errors import PlacementUnavailable
from service.errors import PluginError
from service.errors import Problem
from service.errors import ServiceError
from service.placement import default_hooks
from service.placement import finding
from service.placement import hookspecs
from service.placement.hardware import Hardware
from service.placement.plan import Placement

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Deployment = TypeVar("Deployment", bound=DeploymentConfig)


@dataclass(frozen=True)
class Strategy:
    """One usable strategy: its hooks, bound, and what it says about itself."""

    name: str
    source: str
    summary: str
    options_schema: type[BaseModel] | None
    defaults: Mapping[str, Any]
    hooks: Mapping[str, Callable[..., Any]] = field(repr=False)

    def plan(self, config: ModelConfig, hardware: Hardware) -> Placement:
        """See `hookspecs.plan`. Raises PluginError if the plugin breaks."""
        placement = self._call("plan", config=config, hardware=hardware)
        if not isinstance(placement, Placement):
            raise self._broke("plan", f"returned {_short(placement)}; it must return a Placement")
        if config.compile and (why := _not_whole(placement)):
            raise PlacementUnavailable(
                f"compile: true needs a model that is whole on one device and not quantised; {why}",
                hint="set compile: false",
            )
        return placement

    def load(self, config: ModelConfig, placement: Placement) -> "PreTrainedModel":
        """See `hookspecs.load`. Call it only through `loading.load`, which holds the load lock."""
        from torch.nn import Module

        model = self.hooks["load"](config=config, placement=placement)
        if not isinstance(model, Module):
            raise self._broke("load", f"returned {_short(model)}; it must return the model")
        return model

    def validate(self, model: "PreTrainedModel", placement: Placement) -> None:
        """See `hookspecs.validate`."""
        self._call("validate", model=model, placement=placement)

    def place_inputs(
        self, model: "PreTrainedModel", inputs: "Mapping[str, Tensor]"
    ) -> "dict[str, Tensor]":
        """See `hookspecs.place_inputs`. Hot path: nothing is added to the plugin's own work."""
        return self.hooks["place_inputs"](model=model, inputs=inputs)  # type: ignore[no-any-return]

    def release(self, model: "PreTrainedModel") -> None:
        """See `hookspecs.release`."""
        self._call("release", model=model)

    def _call(self, hook: str, **arguments: Any) -> Any:
        try:
            return self.hooks[hook](**arguments)
        except ServiceError:
            raise
        except (Exception, SystemExit) as error:  # a plugin may raise anything, or want to leave
            raise self._broke(hook, f"raised {finding.describe(error)}") from error

    def _broke(self, hook: str, what: str) -> PluginError:
        return PluginError(f"strategy {self.name}: {hook} {what} ({self.source})")


def _short(value: object) -> str:
    """A value in one line, for messages."""
    return " ".join(repr(value).split())[:80]


@dataclass(frozen=True)
class Registry:
    """What was found: usable strategies and, by name, why others are not."""

    strategies: Mapping[str, Strategy]
    broken: Mapping[str, PluginError]
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of each name

    def select(self, name: str, origin: Origin = BUILT_IN, key: str = "strategy") -> Strategy:
        """The strategy of that name. `origin` and `key` say where the name was written.

        Raises the PluginError of a broken strategy, or ConfigError for a name nobody has.
        """
        if name in self.broken:
            raise self.broken[name]
        if name in self.strategies:
            return self.strategies[name]
        names = sorted({*self.strategies, *self.broken})
        guess = difflib.get_close_matches(name, names, n=1)
        maybe = f"; did you mean '{guess[0]}'?" if guess else "."
        message = f"unknown strategy '{name}'{maybe} Installed: {', '.join(names)}"
        raise ConfigError([Problem(origin.where(), key, message, origin.source, origin.column)])


class _Manager(pluggy.PluginManager):
    """A plugin manager that can be closed.

    A plugin registered after the hooks of a strategy were bound would be called with it, and win.
    """

    closed = False

    def register(self, plugin: object, name: str | None = None) -> str | None:
        if self.closed:
            raise PluginError(
                f"{plugin!r:.80} came too late: strategies are registered when Moorage looks for "
                "them",
                hint="put it into strategy_dirs or install it with an entry point",
            )
        return super().register(plugin, name)


def build(strategy_dirs: Sequence[Path] = (), files: Sequence[Path] = ()) -> Registry:
    """Find, import and check every strategy.

    Runs the import of every plugin module, and nothing else of it. Raises PluginError only for a
    folder that does not exist; a broken strategy is kept as its error.
    """
    manager = _Manager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(default_hooks)
    accepted: dict[str, tuple[finding.Found, object]] = {}
    broken: dict[str, PluginError] = {}
    sources: dict[str, list[str]] = {}
    for found in finding.find(strategy_dirs, files):
        name, plugin, error = _examine(found)
        same = sources.setdefault(name, [])
        same.append(found.source)
        if error is None and name in accepted and _one_file(plugin, accepted[name][1]):
            continue  # found twice: installed from its own folder, and named as a file
        if len(same) > 1:
            accepted.pop(name, None)
            broken[name] = PluginError(
                f"{len(same)} strategies are called {name}: {' and '.join(same)}",
                hint="give one of them another NAME",
            )
        elif error is not None:
            broken[name] = error
        else:
            accepted[name] = (found, plugin)
    for name, (found, plugin) in accepted.items():
        manager.register(plugin, f"{name} ({found.source})")
    names = manager.list_name_plugin()
    strategies = {}
    for name, (found, plugin) in accepted.items():
        others = [other for _, other in names if other is not plugin]
        hooks = {}
        for hook in finding.HOOKS:
            # a strategy's own hook that returns None must not be answered by the default's result
            needs_default = not inspect.isroutine(getattr(plugin, hook, None))
            rest = [o for o in others if not (needs_default and o is default_hooks)]
            hooks[hook] = manager.subset_hook_caller(hook, rest)
        strategies[name] = Strategy(
            name,
            found.source,
            (inspect.getdoc(plugin) or "").partition("\n")[0],
            getattr(plugin, "Options", None),
            finding.defaults_of(plugin),
            hooks,
        )
    manager.closed = True
    return Registry(strategies, broken, sources)


def _not_whole(placement: Placement) -> str:
    """What keeps torch.compile from making one graph of it, or ""."""
    if len(placement.devices) > 1:
        return f"this one is on {' and '.join(placement.devices)}"
    if placement.quantized:
        return f"{placement.quantized} linears of this one would be"
    return ""


def _one_file(one: object, other: object) -> bool:
    """Whether two plugins are modules that came from the same file."""
    files = [getattr(plugin, "__file__", None) for plugin in (one, other)]
    return None not in files and files[0] == files[1]


def _examine(found: finding.Found) -> tuple[str, object, PluginError | None]:
    """Import and check one strategy: its name, the plugin, and what is wrong with it."""
    name, plugin = found.name, None
    try:
        plugin = finding.import_plugin(found)
        name = str(getattr(plugin, "NAME", name))
        finding.check(name, plugin, found.source)
    except PluginError as error:
        return name, plugin, error
    except Exception as error:  # looking at a plugin can run its code, which may raise anything
        what = f"strategy {name} cannot be examined: {finding.describe(error)} ({found.source})"
        return name, plugin, PluginError(what)
    return name, plugin, None


def settle(
    config: Deployment, strategy: Strategy, origins: Mapping[str, Origin], *, first: bool = True
) -> Deployment:
    """The deployment with this strategy's defaults, and its options checked.

    Options belong to the deployment's first strategy; another runs with its own defaults.
    Raises ConfigError, or PluginError if the strategy's `Options` break.
    """
    changes: dict[str, Any] = {"strategy": strategy.name}
    for key, value in strategy.defaults.items():
        if origins.get(key, BUILT_IN).layer == "built-in":
            changes[key] = value
    words: Any = (config.options or {}) if first else {}
    origin = origins.get("options", BUILT_IN)
    if isinstance(words, BaseModel):
        changes["options"] = words
    elif strategy.options_schema is None:
        if words:
            key = f"options.{next(iter(words))}"
            message = f"strategy {strategy.name} has no options"
            raise ConfigError([_problem(origins.get(key, origin), key, message)])
        changes["options"] = None
    else:
        schema = strategy.options_schema
        try:
            changes["options"] = schema.model_validate(dict(words))
        except ValidationError as error:
            raise ConfigError(_option_problems(error, schema, strategy.name, origins)) from None
        except Exception as error:  # a validator of the plugin may raise anything
            what = f"Options raised {finding.describe(error)}"
            raise PluginError(f"strategy {strategy.name}: {what} ({strategy.source})") from error
        # a model without `extra="forbid"` drops what it does not know; we refuse it all the same
        unknown = [key for key in words if key not in _option_names(schema)]
        if unknown and schema.model_config.get("extra", "ignore") == "ignore":
            raise ConfigError(
                [
                    _problem(
                        origins.get(f"options.{key}", origin),
                        f"options.{key}",
                        _no_such_option(key, schema, strategy.name),
                    )
                    for key in unknown
                ]
            )
    return config.model_copy(update=changes)


def _option_problems(
    error: ValidationError, schema: type[BaseModel], strategy: str, origins: Mapping[str, Origin]
) -> list[Problem]:
    problems = []
    for item in error.errors():
        key = ".".join(("options", *(str(part) for part in item["loc"])))
        message = f"{item['msg'][0].lower()}{item['msg'][1:]}"
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            message = _no_such_option(str(item["loc"][0]), schema, strategy)
        entry = ".".join(key.split(".")[:2])
        origin = origins.get(entry, origins.get("options", BUILT_IN))
        problems.append(_problem(origin, key, message))
    return problems


def _no_such_option(key: str, schema: type[BaseModel], strategy: str) -> str:
    known = _option_names(schema)
    guess = difflib.get_close_matches(key, known, n=1)
    maybe = f"; did you mean '{guess[0]}'?" if guess else f"; it has {', '.join(known) or 'none'}"
    return f"strategy {strategy} has no such option{maybe}"


def _option_names(schema: type[BaseModel]) -> list[str]:
    fields = schema.model_fields.items()
    return [*schema.model_fields, *(f.alias for _, f in fields if f.alias is not None)]


def _problem(origin: Origin, key: str, message: str) -> Problem:
    return Problem(origin.where(), key, message, origin.source, origin.column)
