"""A model that changes while it serves is noticed and told; by config it is loaded again."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from service.deployment import drift
from service.errors import NotReady
from service.errors import PlacementDrifted
from tests.deployment.conftest import Hanging
from tests.deployment.conftest import Make
from tests.deployment.conftest import answer
from tests.deployment.conftest import end_of_loading
from tests.deployment.conftest import find
from tests.deployment.conftest import model_of
from tests.deployment.conftest import signalled
from tests.deployment.strategies import KEEPING
from tests.deployment.strategies import RELEASING
from tests.deployment.strategies import write
from tests.support.gates import PATIENCE_S
from tests.support.gates import new_gate


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe waits for its look, however long that takes here."""
    monkeypatch.setattr("service.placement.watch.PROBE_WAIT_S", PATIENCE_S)


def test_a_ready_deployment_says_that_it_is_watched(make: Make) -> None:
    deployment = make().settle()
    assert deployment.document()["watch"]["enabled"] is True
    deployment.probed()
    told = deployment.document()["watch"]
    assert (told["checks"], told["findings"]) == (1, [])
    assert told["checked_at"]


def test_a_probe_sees_the_change_and_the_process_is_to_end(make: Make) -> None:
    watched = make()
    deployment = watched.settle()
    dead = signalled(watched, "on_death")
    model_of(deployment).half()
    with pytest.raises(PlacementDrifted, match=r"\(F18\): .* was float32, is float16"):
        deployment.probed()
    assert dead.wait(PATIENCE_S)
    assert (watched.deaths, watched.failures) == (1, [])
    assert deployment.state == "degraded"
    with pytest.raises(PlacementDrifted, match="as it should be at"):
        deployment.serving()
    document = deployment.document()
    assert document["state"] == "degraded"
    assert document["error"]["code"] == "placement_drifted"
    assert document["error"]["failure_class"] == "F18"
    certificate = document["certificate"]
    assert certificate["valid"] is False
    assert "was float32, is float16" in certificate["revoked"]
    assert certificate["issued_at"] <= certificate["unchanged_until"]
    finding = document["watch"]["findings"][0]
    assert (finding["class"], finding["was"], finding["now"]) == ("F18", "float32", "float16")
    deployment.drain(0.0)
    with pytest.raises(NotReady, match="draining"):
        deployment.serving()


def test_the_timer_sees_the_change_when_nobody_asks(make: Make) -> None:
    watched = make(watch_interval_s=0.01)
    deployment = watched.settle()
    dead = signalled(watched, "on_death")
    model_of(deployment).lm_head.half()
    assert dead.wait(PATIENCE_S)
    assert deployment.state == "degraded"


def test_without_a_watch_nobody_looks(make: Make) -> None:
    deployment = make(watch_interval_s=0).settle()
    assert deployment.document()["watch"] == {
        "enabled": False,
        "checked_at": None,
        "checks": 0,
        "findings": [],
    }
    model_of(deployment).lm_head.half()
    find(deployment)
    assert deployment.probed() is deployment.serving()


def test_open_streams_end_with_what_changed(make: Make) -> None:
    deployment = make().settle()
    model = model_of(deployment)

    def cast(module: Any, args: Any, output: Any) -> None:
        """After a whole step, on the thread of the engine."""
        handle.remove()
        module.half()
        deployment.serving().engine.inspect(0.0)

    handle = model.register_forward_hook(cast)
    with pytest.raises(PlacementDrifted, match="was float32, is float16"):
        answer(deployment, [1, 2, 3])


def test_a_step_that_fails_because_of_the_change_says_so(make: Make) -> None:
    """Half of a product in another number format: torch raises."""
    deployment = make().settle()
    model_of(deployment).model.layers[1].mlp.down_proj.half()
    with pytest.raises(PlacementDrifted, match=r"down_proj.weight was float32, is float16"):
        answer(deployment, [1, 2, 3])


def test_a_nan_in_a_weight_ends_what_would_answer_with_it(make: Make) -> None:
    deployment = make().settle()
    model_of(deployment).model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(PlacementDrifted, match=r"\(F16\): model.norm.weight was finite numbers"):
        answer(deployment, [1, 2, 3])


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_deployment_raises_no_alarm(make: Make, quantize: str) -> None:
    watched = make("four-bit" if quantize == "nf4" else "cpu", quantize=quantize)
    deployment = watched.settle()
    assert deployment.state == "ready", deployment.error
    for prompt in ([1, 2, 3], [4], list(range(20))):
        find(deployment)
        assert len(answer(deployment, prompt)) == 4
    assert deployment.document()["watch"]["checks"] == 3
    assert deployment.state == "ready"


def test_a_reload_brings_the_same_deployment_up_again_in_this_process(make: Make) -> None:
    watched = make(on_drift="reload")
    deployment = watched.settle()
    before = answer(deployment, [1, 2, 3])
    old = weakref.ref(model_of(deployment))
    ready = signalled(watched, "on_ready")
    old().half()  # type: ignore[union-attr]
    find(deployment)
    assert ready.wait(PATIENCE_S)
    assert (watched.ready, watched.deaths, watched.failures) == (["tiny", "tiny"], 0, [])
    assert old() is None
    document = deployment.document()
    assert (document["state"], document["progress"]) == ("ready", 1.0)
    assert document["certificate"]["valid"] is True
    assert document["watch"]["findings"] == []
    assert document["attempts"] == []
    assert "loaded again: the model changed while serving (F18)" in document["warnings"][-1]
    assert "error" not in document
    assert answer(deployment, [1, 2, 3]) == before
    find(deployment)
    assert deployment.state == "ready"


def test_a_reload_calls_the_release_of_the_strategy(make: Make, tmp_path: Path) -> None:
    keeping = KEEPING.replace('    model.lm_head.to("meta")\n', "")
    write(tmp_path / "strategies", "releasing", {"load": keeping + RELEASING})
    watched = make("releasing", on_drift="reload")
    deployment = watched.settle()
    ready = signalled(watched, "on_ready")
    model_of(deployment).half()
    find(deployment)
    assert ready.wait(PATIENCE_S), deployment.error
    assert deployment.state == "ready"


def test_a_model_that_somebody_keeps_is_not_loaded_a_second_time(make: Make) -> None:
    watched = make(on_drift="reload")
    deployment = watched.settle()
    dead = signalled(watched, "on_death")
    kept = model_of(deployment).half()
    find(deployment)
    assert dead.wait(PATIENCE_S)
    assert kept is not None
    assert deployment.state == "failed"
    assert deployment.error is not None
    assert deployment.error.failure_class == "F21"
    assert not watched.failures


FAILING_LATER = """
times = []


@hookimpl
def load(config, placement):
    times.append(1)
    if len(times) > 1:
        raise OSError("the disk is gone")
    return loaded(config, placement)
"""


def test_a_reload_that_fails_leaves_it_to_a_fresh_process(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "failing-later", {"load": FAILING_LATER})
    watched = make("failing-later", on_drift="reload")
    deployment = watched.settle()
    dead = signalled(watched, "on_death")
    model_of(deployment).half()
    find(deployment)
    assert dead.wait(PATIENCE_S)
    assert deployment.error is not None
    assert "load raised OSError: the disk is gone" in deployment.error.message
    assert (deployment.state, watched.failures) == ("failed", [])


def test_a_model_that_changes_again_and_again_is_not_reloaded_for_ever(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "MOST_RELOADS", 1)
    watched = make(on_drift="reload")
    deployment = watched.settle()
    ready, dead = signalled(watched, "on_ready"), signalled(watched, "on_death")
    model_of(deployment).half()
    find(deployment)
    assert ready.wait(PATIENCE_S)
    model_of(deployment).half()
    find(deployment)
    assert dead.wait(PATIENCE_S)
    assert deployment.state == "degraded"


def test_a_drain_while_it_reloads_is_not_undone(
    make: Make, tmp_path: Path, hanging: Hanging
) -> None:
    name, gate = hanging("load")
    gate.open()
    watched = make(name, on_drift="reload")
    deployment = watched.settle()
    second = new_gate(name)
    model_of(deployment).half()
    find(deployment)
    second.wait_until_reached()
    assert deployment.state == "loading"
    with pytest.raises(NotReady, match="loading"):
        deployment.probed()
    deployment.drain(0.0)
    second.open()
    end_of_loading()
    assert deployment.state == "draining"
    assert watched.ready == ["tiny"]
