"""The engine looks at its model between steps, and ends when it is no longer the one."""

import threading
from collections.abc import Callable
from collections.abc import Iterator

import pytest

from service.engine.engine import Engine
from service.engine.scheduler import Batch
from service.errors import EngineStopped
from service.errors import InvalidRequest
from service.errors import PlacementDrifted
from tests.engine.scripted import WAIT_S
from tests.engine.scripted import Gate
from tests.engine.scripted import ScriptedRunner
from tests.engine.scripted import greedy
from tests.engine.scripted import read_all

DRIFT = "lm_head.weight was float32, is float16"


class Looks:
    """Stands in for `Watch.look`: finds a change when a test says so."""

    def __init__(self) -> None:
        self.taken: list[bool] = []
        self.threads: set[str] = set()
        self.drifted = False
        self.raises: Exception | None = None

    def __call__(self, thorough: bool) -> PlacementDrifted | None:
        self.taken.append(thorough)
        self.threads.add(threading.current_thread().name)
        if self.raises is not None:
            raise self.raises
        return PlacementDrifted(DRIFT) if self.drifted else None


Start = Callable[..., Engine]


@pytest.fixture
def looks() -> Looks:
    return Looks()


@pytest.fixture
def deaths() -> list[BaseException]:
    return []


@pytest.fixture
def start(looks: Looks, deaths: list[BaseException]) -> Iterator[Start]:
    engines: list[Engine] = []

    def start(runner: ScriptedRunner) -> Engine:
        engine = Engine(runner, max_queue=8, on_death=deaths.append)
        engines.append(engine)
        engine.start()
        engine.look_with(looks)
        return engine

    yield start
    for engine in engines:
        engine.close()


def test_an_idle_engine_looks_at_once_on_its_own_thread(start: Start, looks: Looks) -> None:
    engine = start(ScriptedRunner())
    assert engine.inspect(WAIT_S)
    assert looks.taken == [False]
    assert looks.threads == {"engine"}
    assert engine.alive


def test_it_does_not_look_during_a_step_but_after_it(start: Start, looks: Looks) -> None:
    gate = Gate()
    engine = start(ScriptedRunner(before_step=gate))
    stream = engine.submit([1], greedy(3))
    gate.wait_inside()
    assert not engine.inspect(0.01)
    assert looks.taken == []
    gate.open()
    assert read_all(stream) == [2, 3, 4]
    assert looks.taken == [False]


def test_who_does_not_wait_is_looked_for_all_the_same(start: Start, looks: Looks) -> None:
    engine = start(ScriptedRunner())
    engine.inspect(0.0)
    assert engine.inspect(WAIT_S)
    assert looks.taken in ([False], [False, False])


def test_steps_alone_do_not_look(start: Start, looks: Looks) -> None:
    engine = start(ScriptedRunner())
    assert len(read_all(engine.submit([1], greedy(20)))) == 20
    assert looks.taken == []


def test_a_change_ends_every_stream_with_what_changed(
    start: Start, looks: Looks, deaths: list[BaseException]
) -> None:
    gate = Gate()
    engine = start(ScriptedRunner(before_step=gate))
    streams = [engine.submit([1], greedy(50)) for _ in range(6)]  # four of them wait
    gate.wait_inside()
    looks.drifted = True
    engine.inspect(0.0)
    gate.open()
    for stream in streams:
        with pytest.raises(PlacementDrifted, match=DRIFT):
            read_all(stream)
    with pytest.raises(EngineStopped, match=DRIFT):
        engine.submit([1], greedy(1))
    engine.close()
    assert not engine.alive
    assert [type(death) for death in deaths] == [PlacementDrifted]


def test_a_change_is_no_traceback_in_the_log(
    start: Start, looks: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(ScriptedRunner())
    looks.drifted = True
    engine.inspect(WAIT_S)
    engine.close()
    assert caplog.text == ""


def test_its_end_lets_go_of_the_model_and_every_cache(start: Start, looks: Looks) -> None:
    gate = Gate()
    runner = ScriptedRunner(before_step=gate)
    engine = start(runner)
    engine.submit([1], greedy(50))
    gate.wait_inside()
    looks.drifted = True
    engine.inspect(0.0)
    gate.open()
    engine.close()
    assert runner.released


def fail(error: Exception) -> Callable[[Batch], None]:
    def before_step(batch: Batch) -> None:
        raise error

    return before_step


def test_a_step_that_raised_is_followed_by_a_thorough_look(start: Start, looks: Looks) -> None:
    engine = start(ScriptedRunner(before_step=fail(RuntimeError("expected device meta"))))
    with pytest.raises(Exception, match="The model failed on this request"):
        read_all(engine.submit([1], greedy(2)))
    assert looks.taken == [True]
    assert engine.alive


def test_a_step_without_numbers_is_followed_by_a_thorough_look(start: Start, looks: Looks) -> None:
    engine = start(ScriptedRunner(sick=50))
    with pytest.raises(Exception, match="NaN") as caught:
        read_all(engine.submit([50], greedy(2)))
    assert caught.value.code == "non_finite_logits"  # type: ignore[attr-defined]
    assert looks.taken == [True]


def test_a_request_that_is_refused_is_no_reason_to_look(start: Start, looks: Looks) -> None:
    engine = start(ScriptedRunner(before_step=fail(InvalidRequest("no"))))
    with pytest.raises(InvalidRequest):
        read_all(engine.submit([1], greedy(2)))
    assert looks.taken == []


def test_a_failed_step_of_a_changed_model_ends_with_what_changed(
    start: Start, looks: Looks
) -> None:
    looks.drifted = True
    engine = start(ScriptedRunner(before_step=fail(RuntimeError("expected device meta"))))
    with pytest.raises(PlacementDrifted, match=DRIFT):
        read_all(engine.submit([1], greedy(2)))


def test_a_look_that_raises_is_logged_and_ends_nothing(
    start: Start, looks: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    looks.raises = RuntimeError("CUDA error: out of memory")
    engine = start(ScriptedRunner())
    assert engine.inspect(WAIT_S)
    assert "the model could not be looked at" in caplog.text
    assert read_all(engine.submit([1], greedy(2))) == [2, 3]


def test_a_closed_engine_is_not_asked_again(start: Start, looks: Looks) -> None:
    engine = start(ScriptedRunner())
    engine.close()
    assert not engine.inspect(WAIT_S)
    assert looks.taken == []
