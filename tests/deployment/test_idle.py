"""A model that nobody asks is released; the next request loads it again and waits for it."""

import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.deployment import Deployment
from service.deployment.uses import Uses
from service.engine.params import SamplingParams
from service.errors import NotReady
from tests.deployment.conftest import Hanging
from tests.deployment.conftest import Make
from tests.deployment.conftest import answer
from tests.deployment.conftest import model_of
from tests.deployment.conftest import signalled
from tests.deployment.strategies import KEEPING
from tests.deployment.strategies import write
from tests.server.process import wait_for
from tests.support.gates import PATIENCE_S
from tests.support.gates import new_gate

STAYS = 100_000.0
"""Seconds without a request that no test takes."""


def asleep(deployment: Deployment) -> None:
    """Wait until it has unloaded, and done with it."""
    wait_for("the idle state", lambda: deployment.state == "idle")
    deployment.turn.wait("a test")
    deployment.turn.give()


def fall_asleep(deployment: Deployment) -> None:
    """Have a model that stays, however long a test takes, unload now; once it is woken it stays."""
    status = deployment.status
    staying = status.config
    soon = staying.deployment.model_copy(update={"idle_unload_s": 0.01})
    status.config = replace(staying, deployment=soon)
    deployment.serving().uses.look_again()
    asleep(deployment)
    deployment.status.config = staying


def ask(deployment: Deployment, deadline: float | None = None) -> list[int]:
    """As a request does it."""
    serving = deployment.use(deadline)
    try:
        stream = serving.engine.submit([1, 2, 3], SamplingParams(max_tokens=4, temperature=0.0))
        tokens: list[int] = []
        while more := stream.read(PATIENCE_S):
            tokens += more
        return tokens
    finally:
        serving.uses.leave()


def test_a_model_that_nobody_asks_is_released_and_says_so(make: Make) -> None:
    watched = make(idle_unload_s=0.01)
    watched.deployment.start()
    asleep(watched.wait())
    deployment = watched.deployment
    document = deployment.document()
    assert document["state"] == "idle"
    assert document["certificate"] is None
    assert document["engine"]["path"] is None
    assert document["model"]["id"] == "tiny"
    assert deployment.probed().model_id == "tiny"
    assert deployment.serving().engine.stats().running == 0
    assert not deployment.serving().engine.alive
    assert (watched.deaths, watched.failures) == (0, [])


def test_its_memory_is_back(make: Make) -> None:
    deployment = make(idle_unload_s=STAYS).settle()
    serving = deployment.use()
    model = weakref.ref(model_of(deployment))
    assert model() is not None
    serving.uses.leave()
    fall_asleep(deployment)
    assert model() is None


def test_requests_that_arrive_together_share_one_load(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "counting", {"load": COUNTING})
    deployment = make("counting", idle_unload_s=STAYS).settle()
    first = ask(deployment)
    fall_asleep(deployment)
    got: list[list[int]] = []
    asking = [threading.Thread(target=lambda: got.append(ask(deployment))) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(PATIENCE_S)
    assert got == [first] * 4
    assert deployment.document()["certificate"]["valid"] is True
    [*_, loads] = deployment.document()["warnings"]
    assert loads == "2 loads"


COUNTING = """
times = []


@hookimpl
def plan(config, hardware):
    import dataclasses

    found = planning.on_one_device(config, hardware, "cpu")
    return dataclasses.replace(found, notes=(f"{len(times) + 1} loads",))


@hookimpl
def load(config, placement):
    times.append(1)
    return loaded(config, placement)
"""


def test_a_request_is_no_idleness() -> None:
    uses = Uses()
    assert uses.enter()
    assert not uses.close_if_free(0.0)
    uses.leave()
    assert uses.close_if_free(0.0)
    assert not uses.enter()


def test_without_the_setting_it_stays(make: Make) -> None:
    clock = [0.0]
    uses = Uses(lambda: clock[0])
    ended = threading.Event()

    def watch() -> None:
        assert not uses.wait_idle(lambda: 0.0)
        ended.set()

    threading.Thread(target=watch).start()
    clock[0] = 1e9
    uses.look_again()
    assert not ended.wait(0.05)
    uses.close()
    assert ended.wait(PATIENCE_S)


def test_who_cannot_wait_that_long_is_told_to_come_again(
    make: Make, tmp_path: Path, hanging: Hanging
) -> None:
    name, gate = hanging("load")
    gate.open()
    watched = make(name, idle_unload_s=0.01)
    watched.deployment.start()
    deployment = watched.wait()
    asleep(deployment)
    second = new_gate(name)
    with pytest.raises(NotReady, match="is not loaded yet") as refused:
        deployment.use(time.monotonic())
    assert refused.value.retry_after_s
    second.wait_until_reached()
    assert deployment.state == "loading"
    assert deployment.probed().model_id == "tiny"
    second.open()
    wait_for("the model", lambda: deployment.state != "loading")


FAILING_ONCE = """
times = []


@hookimpl
def load(config, placement):
    times.append(1)
    if len(times) == 2:
        raise OSError("the disk /secret is gone")
    return loaded(config, placement)
"""


def test_a_wake_that_fails_is_told_and_the_next_request_tries_again(
    make: Make, tmp_path: Path
) -> None:
    write(tmp_path / "strategies", "failing-once", {"load": FAILING_ONCE})
    watched = make("failing-once", idle_unload_s=STAYS)
    deployment = watched.settle()
    first = ask(deployment)
    fall_asleep(deployment)
    with pytest.raises(NotReady, match="could not be loaded again") as refused:
        deployment.use()
    assert "/secret" not in refused.value.message
    assert deployment.state == "idle"
    assert "the disk /secret is gone" in deployment.document()["error"]["message"]
    assert ask(deployment) == first
    assert "error" not in deployment.document()
    assert (watched.deaths, watched.failures) == (0, [])


def test_a_model_that_somebody_keeps_ends_the_process(make: Make, tmp_path: Path) -> None:
    keeping = KEEPING.replace('    model.lm_head.to("meta")\n', "")
    write(tmp_path / "strategies", "keeping", {"load": keeping})
    watched = make("keeping", idle_unload_s=0.01)
    dead = signalled(watched, "on_death")
    watched.deployment.start()
    assert dead.wait(PATIENCE_S)
    error: Any = watched.deployment.error
    assert error.failure_class == "F21"
    with pytest.raises(NotReady):
        watched.deployment.use()


def test_a_drain_ends_those_that_wait_for_the_wake(make: Make, hanging: Hanging) -> None:
    name, gate = hanging("load")
    gate.open()
    watched = make(name, idle_unload_s=0.01)
    watched.deployment.start()
    deployment = watched.wait()
    asleep(deployment)
    second = new_gate(name)
    refused = threading.Event()

    def wait() -> None:
        with pytest.raises(NotReady, match="draining"):
            deployment.use()
        refused.set()

    threading.Thread(target=wait).start()
    second.wait_until_reached()
    deployment.drain(0.0)
    assert refused.wait(PATIENCE_S)
    second.open()
    assert watched.ready == ["tiny"]


def test_it_answers_as_ever_before_it_is_idle(make: Make) -> None:
    deployment = make(idle_unload_s=STAYS).settle()
    assert answer(deployment, [1, 2, 3]) == ask(deployment)
    assert deployment.state == "ready"


def test_who_watches_an_idle_model_ends_with_it(make: Make) -> None:
    """Whatever ended it: a thread that looks again and again would take the others' time."""
    before = set(threading.enumerate())
    deployment = make(idle_unload_s=STAYS).settle()
    watching = [one for one in set(threading.enumerate()) - before if one.name == "idle"]
    deployment.drain(0.0)
    assert watching
    for one in watching:
        one.join(PATIENCE_S)
        assert not one.is_alive()
