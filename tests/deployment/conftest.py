"""A deployment of a tiny model whose callbacks are recorded, and strategies that misbehave."""

import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.config.origin import Origin
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.deployment import Deployment
from service.engine.params import SamplingParams
from service.errors import ServiceError
from service.placement import guard
from tests.deployment.strategies import HANGING
from tests.deployment.strategies import HANGS
from tests.deployment.strategies import write
from tests.support.gates import PATIENCE_S
from tests.support.gates import Gate
from tests.support.gates import new_gate
from tests.support.tiny import save_tiny


class Watched:
    """A deployment whose callbacks are recorded."""

    def __init__(self, config: Config) -> None:
        self.deployment = Deployment(config)
        self.ready: list[str] = []
        self.failures: list[ServiceError] = []
        self.deaths = 0
        self._settled = threading.Event()
        self.deployment.on_ready = self._on_ready
        self.deployment.on_failure = self._on_failure
        self.deployment.on_death = self._on_death

    def _on_ready(self, model_id: str) -> None:
        self.ready.append(model_id)
        self._settled.set()

    def _on_failure(self, error: ServiceError) -> None:
        self.failures.append(error)
        self._settled.set()

    def _on_death(self) -> None:
        self.deaths += 1

    def settle(self) -> Deployment:
        """Start, and wait until it is ready or has failed."""
        self.deployment.start()
        return self.wait()

    def wait(self) -> Deployment:
        assert self._settled.wait(PATIENCE_S), f"still {self.deployment.state}"
        return self.deployment


Make = Callable[..., Watched]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama", tie=False)


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Iterator[Make]:
    """make(strategy, **keys): a deployment of the tiny model; keys are the deployment's, and
    `origins`.
    """
    made: list[Watched] = []

    def make(strategy: str = "cpu", **keys: Any) -> Watched:
        origins = {
            "strategy": Origin("file", "moorage.yaml", 7),
            "quantize": Origin("env", "QUANTIZE"),
            "max_context": Origin("built-in"),
        }
        origins = keys.pop("origins", origins)
        settings = {"model": str(model), "max_context": 64, "max_sequences": 2, **keys}
        strategies = tmp_path / "strategies"
        if strategies.exists():
            settings["strategy_dirs"] = (strategies,)
        config = Config(
            path=None,
            name="test",
            server=ServerConfig(),
            deployment=DeploymentConfig(strategy=strategy, **settings),
            origins=origins,
            notices=("DEVICE_MAP is an old name.",),
            cache=tmp_path / "cache",
        )
        made.append(Watched(config))
        return made[-1]

    yield make
    for watched in made:
        watched.deployment.drain(0.0)
    guard.heal()


def answer(deployment: Deployment, prompt: list[int]) -> list[int]:
    stream = deployment.serving().engine.submit(
        prompt, SamplingParams(max_tokens=4, temperature=0.0)
    )
    tokens: list[int] = []
    while more := stream.read(PATIENCE_S):
        tokens += more
    return tokens


def end_of_loading() -> None:
    for thread in threading.enumerate():
        if thread.name == "load":
            thread.join(PATIENCE_S)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Callable[[str], tuple[str, Gate]]]:
    """Write a strategy that hangs in a hook until the test, or its end, opens the gate. Returns
    its name and the gate.
    """
    gates: list[Gate] = []

    def write_one(hook: str) -> tuple[str, Gate]:
        arguments, result = HANGS[hook]
        name = f"hangs-in-{hook.replace('_', '-')}"
        gates.append(new_gate(name))
        text = HANGING.format(hook=hook, arguments=arguments, result=result, name=name)
        write(tmp_path / "strategies", name, {hook: text})
        return name, gates[-1]

    yield write_one
    for one in gates:
        one.open()
    end_of_loading()


Hanging = Callable[[str], tuple[str, Gate]]


def model_of(deployment: Deployment) -> Any:
    return deployment.serving().engine._runner._model


def signalled(watched: Watched, callback: str) -> threading.Event:
    """Set when the callback is called from now on; it is recorded as before."""
    called = threading.Event()
    record = getattr(watched.deployment, callback)

    def call(*args: Any) -> None:
        record(*args)
        called.set()

    setattr(watched.deployment, callback, call)
    return called


def find(deployment: Deployment) -> None:
    """Have the engine look, as the timer does, whenever the last probe was."""
    assert deployment.serving().engine.inspect(PATIENCE_S)
