"""A strategy that fails is named with its stage, and a fallback begins clean and serves."""

from pathlib import Path

import pytest

from service.errors import NotReady
from tests.deployment.conftest import Make
from tests.deployment.conftest import answer
from tests.deployment.faults import FAULTS
from tests.deployment.faults import STAGES
from tests.deployment.strategies import write


def place(folder: Path, name: str) -> None:
    """Write the strategy with that fault."""
    fault = FAULTS[name]
    write(folder, name, fault.hooks)
    if fault.twin:
        write(folder, f"{name}-s-twin", {"beside": f"NAME = {name!r}\n"})


def test_there_is_a_fault_for_every_stage() -> None:
    assert list(dict.fromkeys(fault.stage for fault in FAULTS.values())) == list(STAGES)


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_strategy_never_becomes_ready_and_is_named(
    make: Make, tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    place(tmp_path / "strategies", name)
    watched = make(name)
    deployment = watched.settle()
    assert deployment.state == "failed"
    assert not watched.ready
    [error] = watched.failures
    assert error is deployment.error
    for words in fault.says:
        assert words in error.message
    assert error.code == fault.code
    assert error.failure_class == fault.failure_class
    assert error.tensors == fault.tensors
    assert "\n" not in error.one_line()
    with pytest.raises(NotReady, match="The model is not ready: failed"):
        deployment.serving()
    document = deployment.document()
    assert document["state"] == "failed"
    assert document["error"] == error.as_dict()
    assert document["strategy"]["name"] == name
    [attempt] = document["attempts"]
    assert (attempt["strategy"], attempt["stage"]) == (name, fault.stage)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fallback_serves_after_a_fault_and_says_why(
    make: Make, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    fault = FAULTS[name]
    place(tmp_path / "strategies", name)
    deployment = make(name, fallback=("cpu",)).settle()
    assert f"{name} failed ({fault.stage}): " in caplog.text
    assert deployment.state == "ready", deployment.error
    assert len(answer(deployment, [1, 2, 3])) == 4
    document = deployment.document()
    assert document["strategy"] == {"name": "cpu", "source": "plugins/cpu.py"}
    assert document["certificate"]["valid"] is True
    [attempt] = document["attempts"]
    assert attempt["seconds"] >= 0
    assert {key: attempt[key] for key in attempt if key not in ("seconds", "error")} == {
        "strategy": name,
        "quantize": "none",
        "max_context": 64,
        "max_sequences": 2,
        "on_no_fit": "refuse",
        "stage": fault.stage,
    }
    assert attempt["error"]["code"] == fault.code
    assert fault.says[0] in attempt["error"]["message"]
    assert "error" not in document
