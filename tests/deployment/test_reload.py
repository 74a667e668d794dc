"""A reload takes up the configuration as it is now; each answer is the old model's or the new's."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.config.schema import Config
from service.deployment import Deployment
from service.deployment import reload as reloading
from service.deployment.reload import Outcome
from service.deployment.reload import Wish
from service.engine.params import SamplingParams
from service.errors import ConfigError
from service.errors import ControlFailed
from service.errors import DoesNotFit
from service.errors import LoadFailed
from service.errors import ModelUnavailable
from service.errors import NotReady
from service.errors import Problem
from service.errors import ServiceError
from tests.deployment.conftest import Hanging
from tests.deployment.conftest import Make
from tests.deployment.conftest import answer
from tests.deployment.conftest import model_of
from tests.deployment.strategies import hook
from tests.deployment.strategies import load_then
from tests.deployment.strategies import write
from tests.deployment.test_idle import STAYS
from tests.deployment.test_idle import ask
from tests.deployment.test_idle import asleep
from tests.server.process import wait_for
from tests.support.gates import PATIENCE_S
from tests.support.tiny import save_tiny

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, in bfloat16: while it loads that is the default number format."""
    torch.manual_seed(5)
    return save_tiny(
        tmp_path_factory.mktemp("other") / "other", "llama", tie=False, dtype=torch.bfloat16
    )


def changed(config: Config, **keys: Any) -> Config:
    """The configuration with other values; those of the server block as server={...}."""
    server = config.server.model_copy(update=keys.pop("server", {}))
    deployment = config.deployment.model_copy(update=keys)
    return replace(config, server=server, deployment=deployment)


def reload(
    deployment: Deployment,
    new: Config | Callable[[], Config],
    tell: Callable[[str], None] = lambda doing: None,
    hangs: Callable[[ServiceError], None] = lambda error: None,
    **wish: Any,
) -> Outcome:
    deployment.turn.take("a reload")
    read = new if callable(new) else lambda: new
    return reloading.reload(deployment, read, Wish(**wish), tell, hangs)


def test_the_new_model_answers_and_the_old_one_is_gone(make: Make, other: Path) -> None:
    watched = make()
    deployment = watched.settle()
    kept: list[Config] = []
    deployment.on_reload = kept.append
    old = weakref.ref(model_of(deployment))
    new = changed(deployment.config, model=str(other))
    outcome = reload(deployment, new)
    assert (outcome.way, outcome.model, outcome.changed) == ("beside", "other", ("model",))
    assert outcome.warnings == ()
    assert old() is None
    assert deployment.serving().model_id == "other"
    assert deployment.config is new
    assert kept == [new]
    document = deployment.document()
    assert (document["state"], document["certificate"]["valid"]) == ("ready", True)
    alone = make(model=str(other)).settle()
    assert answer(deployment, PROMPT) == answer(alone, PROMPT)
    assert (watched.ready, watched.deaths, watched.failures) == (["tiny"], 0, [])


def test_running_streams_finish_on_the_old_model_while_the_new_one_is_loaded(
    make: Make, other: Path
) -> None:
    """What a load swaps in this process (F4, F5) does not reach the steps of the old model."""
    watched = make(max_context=512)
    deployment = watched.settle()

    def long(serving: Any) -> list[int]:
        params = SamplingParams(max_tokens=400, temperature=0.0)
        stream = serving.engine.submit(PROMPT, params)
        tokens: list[int] = []
        while more := stream.read(PATIENCE_S):
            tokens += more
        return tokens

    expected = long(deployment.serving())
    stop = threading.Event()
    answers: list[tuple[str, list[int]]] = []
    asked = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            serving = deployment.use()
            asked.set()
            try:
                answers.append((serving.model_id, long(serving)))
            finally:
                serving.uses.leave()

    # one at a time: in bfloat16 two in a batch may round otherwise than one
    thread = threading.Thread(target=stream)
    thread.start()
    assert asked.wait(PATIENCE_S)
    reload(deployment, changed(deployment.config, model=str(other)))
    wait_for("an answer of the new model", lambda: any(name == "other" for name, _ in answers))
    stop.set()
    thread.join(PATIENCE_S)
    of_new = long(deployment.serving())
    assert {name for name, _ in answers} == {"tiny", "other"}
    assert of_new != expected
    for name, tokens in answers:
        assert tokens == (expected if name == "tiny" else of_new)


def test_a_request_that_has_the_old_model_may_still_ask_it(make: Make, other: Path) -> None:
    deployment = make().settle()
    serving = deployment.use()
    done: list[Outcome] = []
    new = changed(deployment.config, model=str(other))
    thread = threading.Thread(target=lambda: done.append(reload(deployment, new)))
    thread.start()
    wait_for("the new model", lambda: deployment.serving().model_id == "other")
    stream = serving.engine.submit(PROMPT, SamplingParams(max_tokens=4, temperature=0.0))
    tokens: list[int] = []
    while more := stream.read(PATIENCE_S):
        tokens += more
    assert len(tokens) == 4
    assert not done
    serving.uses.leave()
    thread.join(PATIENCE_S)
    assert done[0].warnings == ()
    assert not serving.engine.alive


def test_nothing_changed_loads_nothing_unless_forced(make: Make) -> None:
    deployment = make().settle()
    old = model_of(deployment)
    assert reload(deployment, changed(deployment.config)).way == "unchanged"
    assert model_of(deployment) is old
    del old
    assert reload(deployment, changed(deployment.config), force=True).way == "beside"


def test_settings_that_need_no_load_apply_at_once(make: Make) -> None:
    deployment = make().settle()
    old = weakref.ref(model_of(deployment))
    new = changed(
        deployment.config, server={"max_queue": 0}, on_drift="reload", idle_unload_s=STAYS
    )
    outcome = reload(deployment, new)
    assert outcome.way == "settings"
    assert outcome.changed == ("idle_unload_s", "on_drift", "server.max_queue")
    assert model_of(deployment) is old()
    assert deployment.serving().engine._max_queue == 0
    assert deployment.status.model is not None
    assert deployment.status.model.on_drift == "reload"
    assert reload(deployment, changed(deployment.config, idle_unload_s=0.01)).way == "settings"
    asleep(deployment)


def test_what_needs_a_restart_is_refused_by_name(make: Make) -> None:
    deployment = make().settle()
    new = changed(deployment.config, server={"threads": 32, "max_queue": 3})
    with pytest.raises(ConfigError, match=r"server\.threads: has changed, which needs a restart"):
        reload(deployment, new)
    assert deployment.config.server.max_queue == 256
    assert deployment.state == "ready"


def test_a_config_that_cannot_be_read_changes_nothing(make: Make) -> None:
    deployment = make().settle()

    def nonsense() -> Config:
        raise ConfigError([Problem("moorage.yaml:3:1", "", "is nonsense")])

    with pytest.raises(ConfigError, match=r"moorage\.yaml:3:1"):
        reload(deployment, nonsense)
    assert deployment.state == "ready"
    assert reload(deployment, changed(deployment.config)).way == "unchanged"


def test_a_model_that_is_missing_or_corrupt_leaves_the_old_one(
    make: Make, other: Path, tmp_path: Path
) -> None:
    deployment = make().settle()
    before = answer(deployment, PROMPT)
    with pytest.raises(ModelUnavailable, match="the old model serves on"):
        reload(deployment, changed(deployment.config, model=str(tmp_path / "nowhere")))
    broken = save_tiny(tmp_path / "broken", "llama", tie=False)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ServiceError, match="the old model serves on"):
        reload(deployment, changed(deployment.config, model=str(broken)))
    assert answer(deployment, PROMPT) == before
    assert deployment.state == "ready"


def test_a_new_model_that_is_not_proven_never_serves(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "half", load_then('model.lm_head.to("meta")'))
    deployment = make(strategy_dirs=(tmp_path / "strategies",)).settle()
    with pytest.raises(ServiceError, match=r"left on meta.*the old model serves on"):
        reload(deployment, changed(deployment.config, strategy="half"))
    assert deployment.state == "ready"
    assert deployment.document()["strategy"]["name"] == "cpu"


LITTLE = """
from tests.deployment import test_reload


@hookimpl
def plan(config, hardware):
    from service.errors import DoesNotFit

    if hardware.cpu.free_bytes < test_reload.needed[0]:
        raise DoesNotFit("cpu is 1 GiB short")
    return planning.on_one_device(config, hardware, "cpu")
"""
needed = [0]
FREE = 10**12


@pytest.fixture
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strategy `little` fits only when the old model's memory is free again."""
    from service.placement import hardware

    write(tmp_path / "strategies", "little", {"plan": LITTLE})
    machine = hardware.Hardware(hardware.Cpu(2 * FREE, FREE, 2, True))
    monkeypatch.setattr(hardware, "detect", lambda folder: machine)
    monkeypatch.setitem(globals(), "needed", [FREE + 1])


def when_drained(doing: str) -> None:
    """The old model is gone: what it took is free."""
    if doing.startswith("loading"):
        needed[0] = 0


@pytest.mark.usefixtures("little")
def test_what_fits_only_without_the_old_model_is_loaded_after_it(make: Make) -> None:
    deployment = make().settle()
    old = weakref.ref(model_of(deployment))
    states: list[str] = []

    def tell(doing: str) -> None:
        states.append(deployment.state)
        when_drained(doing)

    outcome = reload(deployment, changed(deployment.config, strategy="little"), tell)
    assert outcome.way == "drained"
    assert states == ["ready", "ready", "loading"]
    assert old() is None
    assert deployment.document()["strategy"]["name"] == "little"
    assert len(answer(deployment, PROMPT)) == 4


@pytest.mark.usefixtures("little")
def test_the_operator_may_forbid_the_drain(make: Make) -> None:
    deployment = make().settle()
    new = changed(deployment.config, strategy="little")
    with pytest.raises(DoesNotFit, match=r"1 GiB short.*serves on.*--drain"):
        reload(deployment, new, drain=False)
    assert deployment.state == "ready"


@pytest.mark.usefixtures("little")
def test_what_would_not_fit_even_then_is_refused_while_the_old_one_serves(make: Make) -> None:
    needed[0] = 2 * FREE
    deployment = make().settle()
    old = model_of(deployment)
    with pytest.raises(DoesNotFit, match="1 GiB short"):
        reload(deployment, changed(deployment.config, strategy="little"))
    assert model_of(deployment) is old


def test_after_a_drain_a_new_model_that_fails_gives_way_to_the_old_one(
    make: Make, tmp_path: Path
) -> None:
    write(tmp_path / "strategies", "failing", hook("load", 'raise OSError("the disk is gone")'))
    watched = make(strategy_dirs=(tmp_path / "strategies",))
    deployment = watched.settle()
    before = answer(deployment, PROMPT)
    new = changed(deployment.config, strategy="failing")
    with pytest.raises(LoadFailed, match=r"the disk is gone.*the old model was loaded again"):
        reload(deployment, new, drain=True)
    assert answer(deployment, PROMPT) == before
    document = deployment.document()
    assert document["strategy"]["name"] == "cpu"
    assert any("a reload failed: " in warning for warning in document["warnings"])
    assert (watched.deaths, watched.failures) == (0, [])


def test_while_it_drains_new_requests_are_told_to_come_again(make: Make) -> None:
    deployment = make().settle()
    serving = deployment.use()
    new = changed(deployment.config, max_sequences=3)
    done: list[Outcome] = []
    thread = threading.Thread(target=lambda: done.append(reload(deployment, new, drain=True)))
    thread.start()
    wait_for("the drain", lambda: deployment.state == "loading")
    with pytest.raises(NotReady, match="loading") as refused:
        deployment.use()
    assert refused.value.retry_after_s
    stream = serving.engine.submit(PROMPT, SamplingParams(max_tokens=2, temperature=0.0))
    assert stream.read(PATIENCE_S)
    serving.uses.leave()
    thread.join(PATIENCE_S)
    assert done[0].way == "drained"
    assert ask(deployment)


def test_a_second_reload_is_refused_by_name(make: Make, hanging: Hanging) -> None:
    name, gate = hanging("load")
    deployment = make(strategy_dirs=()).settle()
    folder = make(name).deployment.config.deployment.strategy_dirs
    new = changed(deployment.config, strategy=name, strategy_dirs=folder)
    done: list[Outcome] = []
    thread = threading.Thread(target=lambda: done.append(reload(deployment, new)))
    thread.start()
    gate.wait_until_reached()
    with pytest.raises(ControlFailed, match="a reload is running since 20"):
        deployment.turn.take("a reload")
    assert len(ask(deployment)) == 4
    gate.open()
    thread.join(PATIENCE_S)
    assert done[0].way == "beside"


def test_a_hook_that_hangs_is_told_and_the_old_model_serves(make: Make, hanging: Hanging) -> None:
    name, gate = hanging("load")
    watched = make()
    deployment = watched.settle()
    folder = make(name).deployment.config.deployment.strategy_dirs
    new = changed(deployment.config, strategy=name, strategy_dirs=folder, load_timeout_s=0.3)
    told: list[ServiceError] = []
    late = threading.Event()

    def hangs(error: ServiceError) -> None:
        told.append(error)
        late.set()

    def run() -> None:
        with pytest.raises(ControlFailed):
            reload(deployment, new, hangs=hangs)

    thread = threading.Thread(target=run)
    thread.start()
    assert late.wait(PATIENCE_S)
    assert "was not done within load_timeout_s" in told[0].message
    assert len(ask(deployment)) == 4
    assert watched.failures == []
    gate.open()
    thread.join(PATIENCE_S)
    assert deployment.state == "ready"
    assert deployment.document()["strategy"]["name"] == "cpu"


def test_a_drain_during_a_reload_ends_it(make: Make, hanging: Hanging) -> None:
    name, gate = hanging("load")
    deployment = make().settle()
    folder = make(name).deployment.config.deployment.strategy_dirs
    new = changed(deployment.config, strategy=name, strategy_dirs=folder)
    ended = threading.Event()

    def run() -> None:
        with pytest.raises(ControlFailed, match="the server is stopping"):
            reload(deployment, new)
        ended.set()

    threading.Thread(target=run).start()
    gate.wait_until_reached()
    deployment.drain(0.0)
    gate.open()
    assert ended.wait(PATIENCE_S)
    assert deployment.state == "draining"


def test_an_idle_deployment_is_reloaded_to_a_proven_one(
    make: Make, other: Path, hanging: Hanging
) -> None:
    watched = make(idle_unload_s=0.01)
    watched.deployment.start()
    deployment = watched.wait()
    asleep(deployment)
    new = changed(deployment.config, model=str(other), idle_unload_s=0.0)
    assert reload(deployment, new).way == "beside"
    assert (deployment.state, deployment.serving().model_id) == ("ready", "other")
    assert ask(deployment) == answer(deployment, PROMPT)


def test_before_it_is_ready_nothing_is_reloaded(make: Make) -> None:
    deployment = make().deployment
    with pytest.raises(ControlFailed, match="while the server is planned"):
        reload(deployment, deployment.config)
