"""The strategies of a deployment in the order in which they are tried, each with its own words."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any
from typing import TypeVar

from service.config.origin import BUILT_IN
from service.config.origin import Origin
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ModelConfig
from service.errors import ConfigError
from service.errors import PluginError
from service.errors import Problem
from service.errors import StartupError
from service.placement import registry
from service.placement.hardware import Hardware
from service.placement.plan import Placement
from service.placement.registry import Registry
from service.placement.registry import Strategy
from service.placement.sizes import in_words

Words = TypeVar("Words", bound=DeploymentConfig)


@dataclass(frozen=True)
class Step:
    """The deployment's own strategy, or one entry of its `fallback`.

    changes: what the entry says beside the strategy. origins: of every value, as this step has
    them. with_options: whether the deployment's `options` are meant for this strategy. fault: why
    it can be used by nobody, and stage: where that was found ("import", "select" or "options").
    """

    name: str
    changes: Mapping[str, Any]
    origins: Mapping[str, Origin]
    with_options: bool
    found: Strategy | None = None
    fault: PluginError | None = None
    stage: str = ""

    @property
    def strategy(self) -> Strategy:
        """Raises the PluginError of a strategy that is broken."""
        if self.found is None or self.fault is not None:
            raise self.fault or PluginError(f"strategy {self.name} was not found")
        return self.found

    def settle(self, config: Words) -> Words:
        """The deployment as this step runs it: see `registry.settle`; the step's own words win."""
        settled = registry.settle(config, self.strategy, self.origins, first=self.with_options)
        return settled.model_copy(update=dict(self.changes))

    def __str__(self) -> str:
        """ "auto-shard with quantize nf4", for messages."""
        said = ", ".join(f"{key} {value}" for key, value in self.changes.items())
        return f"{self.name} with {said}" if said else self.name


def steps(config: Config) -> tuple[Registry, tuple[Step, ...]]:
    """Find all strategies, and say which ones this deployment tries, as `steps_among` does."""
    found = registry.build(config.deployment.strategy_dirs)
    return found, steps_among(found, config)


def steps_among(found: Registry, config: Config) -> tuple[Step, ...]:
    """The steps that this deployment tries, its own strategy first. Imports no torch.

    The operator's mistakes are told before anything is loaded, wherever in the chain they are:
    ConfigError has every name that nobody has and every option that is refused. A strategy that is
    broken is kept as its step's fault, because the next one may serve.
    """
    deployment, origins = config.deployment, config.origins
    entries = [(deployment.strategy, dict[str, Any](), origins, "strategy")]
    for number, entry in enumerate(deployment.fallback):
        key = f"fallback[{number}]"
        where = origins.get(key, origins.get("fallback", BUILT_IN))
        said = {name: origins.get(f"{key}.{name}", where) for name in entry.changes}
        own = {**origins, **said, "strategy": origins.get(f"{key}.strategy", where)}
        entries.append((entry.strategy, entry.changes, own, key))
    chain: list[Step] = []
    problems: list[Problem] = []
    for name, changes, its_origins, key in entries:
        step = Step(name, changes, its_origins, name == deployment.strategy)
        try:
            chain.append(_found(step, found, deployment, key))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tuple(chain)


@dataclass(frozen=True)
class Outlook:
    """What one step would plan: a placement, or why there is none.

    left: bytes free on each of its devices with the plan carried out.
    """

    step: Step
    words: DeploymentConfig
    placement: Placement | None = None
    left: Mapping[str, int] = field(default_factory=dict)
    error: StartupError | None = None

    def line(self) -> str:
        """One line: "auto-shard with quantize nf4: fits, 36.8 GiB of weights; left ..."."""
        if self.placement is None:
            return f"{self.step}: {self.error.message if self.error else 'no plan'}"
        left = ", ".join(f"{in_words(size)} on {device}" for device, size in self.left.items())
        return f"{self.step}: fits, {in_words(self._weights)} of weights; left: {left}"

    def as_dict(self) -> dict[str, Any]:
        """An entry of `fallback` in `moorage plan --json`. Sizes in bytes."""
        return {
            "strategy": self.words.strategy,
            "quantize": self.words.quantize,
            "max_context": self.words.max_context,
            "max_sequences": self.words.max_sequences,
            "on_no_fit": self.words.on_no_fit,
            "fits": self.placement is not None,
            "weights": self._weights if self.placement else None,
            "left": dict(self.left),
            "error": self.error.as_dict() if self.error else None,
        }

    @property
    def _weights(self) -> int:
        planned = self.placement.memory.values() if self.placement else ()
        return sum(memory.weights for memory in planned)


def outlook(chain: Sequence[Step], model: ModelConfig, hardware: Hardware) -> list[Outlook]:
    """What each step would plan on this machine. Loads nothing."""
    free = {gpu.id: gpu.free_bytes for gpu in hardware.gpus}
    free |= {"cpu": hardware.cpu.free_bytes, "disk": hardware.disk_free_bytes}
    found = []
    for step in chain:
        words = model.model_copy(update={"strategy": step.name, **step.changes})
        try:
            words = step.settle(model)
            placement = step.strategy.plan(words, hardware)
        except StartupError as error:
            found.append(Outlook(step, words, error=error))
            continue
        left = {
            device: free[device] - memory.total
            for device, memory in placement.memory.items()
            if device in placement.devices
        }
        found.append(Outlook(step, words, placement, left))
    return found


def _found(step: Step, found: Registry, deployment: DeploymentConfig, key: str) -> Step:
    """The step with its strategy, or with why there is none. Raises ConfigError."""
    try:
        strategy = found.select(step.name, step.origins.get("strategy", BUILT_IN), key)
    except PluginError as fault:
        several = len(found.sources.get(step.name, ())) > 1
        return replace(step, fault=fault, stage="select" if several else "import")
    step = replace(step, found=strategy)
    try:
        step.settle(deployment)
    except PluginError as fault:
        return replace(step, fault=fault, stage="options")
    return step
