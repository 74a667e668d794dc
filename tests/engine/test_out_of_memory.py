"""A step for which the device has no memory: smaller ones may fit, and what does not is told."""

import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterator

import pytest
import torch

from service.engine import isolating
from service.engine.engine import Engine
from service.engine.scheduler import Batch
from service.errors import EngineStopped
from service.errors import OutOfMemory
from tests.engine.scripted import WAIT_S
from tests.engine.scripted import Gate
from tests.engine.scripted import ScriptedRunner
from tests.engine.scripted import fail_on
from tests.engine.scripted import greedy
from tests.engine.scripted import idle
from tests.engine.scripted import read_all

FULL = torch.OutOfMemoryError("CUDA out of memory")
Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[Engine] = []

    def start(runner: ScriptedRunner, **settings: object) -> Engine:
        engines.append(engine := Engine(runner, **{"max_queue": 8, **settings}))  # type: ignore[arg-type]
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.close()


def test_sequences_that_do_not_fit_one_step_are_answered_in_several(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    def before_step(batch: Batch) -> None:
        gate(batch)
        if len(batch.pieces) > 2:
            raise FULL

    engine = start(ScriptedRunner(before_step=before_step, max_sequences=8))
    streams = [engine.submit([10 * number], greedy(5)) for number in range(8)]
    gate.open()
    for number, stream in enumerate(streams):
        assert read_all(stream) == [10 * number + more for more in range(1, 6)]
    assert engine.stats().failed == 0
    assert "no memory for 4 sequences" in caplog.text


@pytest.mark.parametrize("error", [FULL, MemoryError("CUDA out of memory")])
def test_the_one_that_does_not_fit_alone_is_told_to_come_back_and_the_others_go_on(
    start: Start, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    gate, guilty = Gate(), fail_on(66, error)

    def before_step(batch: Batch) -> None:
        gate(batch)
        guilty(batch)

    engine = start(ScriptedRunner(before_step=before_step, max_sequences=8))
    before = engine.submit([1], greedy(20))
    gate.wait_inside()
    bad, after = engine.submit([66], greedy(5)), engine.submit([3], greedy(20))
    gate.open()
    with pytest.raises(OutOfMemory) as told:
        read_all(bad)
    assert (told.value.status, told.value.code) == (503, "out_of_memory")
    assert told.value.retry_after_s
    assert "CUDA" not in str(told.value.as_dict())
    assert "CUDA out of memory" in caplog.text
    assert read_all(before) == list(range(2, 22))
    assert read_all(after) == list(range(4, 24))
    assert engine.stats().failed == 1
    assert idle(engine)


def test_the_cache_is_emptied_when_nothing_holds_the_tensors_of_the_step_any_more(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    found: list[object] = []

    def before_step(batch: Batch) -> None:
        activations = torch.ones(4)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(isolating.log, "disabled", True)  # pytest keeps what is logged
    monkeypatch.setattr(isolating, "collect", lambda: found.append(held[-1]()))
    engine = start(ScriptedRunner(before_step=before_step))
    with pytest.raises(OutOfMemory):
        read_all(engine.submit([1], greedy(1)))
    assert found == [None]


def test_when_not_even_a_trial_fits_after_three_in_a_row_the_engine_ends(start: Start) -> None:
    runner = ScriptedRunner(before_step=fail_on(66, FULL))
    died = threading.Event()
    engine = start(runner, on_death=lambda error: died.set())
    runner.broken = FULL
    for error in (OutOfMemory, OutOfMemory, EngineStopped):
        with pytest.raises(error):
            read_all(engine.submit([66], greedy(1)))
    assert died.wait(WAIT_S)
    assert not engine.alive
