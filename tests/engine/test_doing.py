"""A step that does not end is told of, to who asks from another thread."""

from service.engine import doing
from service.engine.doing import Doing
from service.engine.engine import Engine
from tests.engine.scripted import WAIT_S
from tests.engine.scripted import Gate
from tests.engine.scripted import ScriptedRunner
from tests.engine.scripted import greedy
from tests.engine.scripted import read_all
from tests.server.process import wait_for


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_engine_that_is_long_in_a_step_hangs_until_the_step_ends() -> None:
    gate, clock = Gate(), Clock()
    engine = Engine(ScriptedRunner(before_step=gate), max_queue=1, clock=clock)
    engine.start()
    stream = engine.submit([1], greedy(1))
    gate.wait_inside()
    clock.now += doing.HANGS_AFTER_S
    assert engine.hangs() is None
    clock.now += 15
    assert engine.hangs() == "a step of 1 sequence has been running for 75 s"
    assert engine.describe()["hangs"] == engine.hangs()
    gate.open()
    assert read_all(stream) == [2]
    clock.now += 1000
    assert engine.drain(WAIT_S)
    through(engine)
    engine.close()


def test_an_engine_without_work_never_hangs() -> None:
    clock = Clock()
    engine = Engine(ScriptedRunner(), max_queue=1, clock=clock)
    engine.start()
    assert read_all(engine.submit([1], greedy(2))) == [2, 3]
    assert engine.inspect(WAIT_S)
    engine.drain(WAIT_S)
    clock.now += 1000
    through(engine)
    engine.close()


def through(engine: Engine) -> None:
    """Nothing runs any more: who reads the last token may know it before the thread is done."""
    wait_for("the end of the step", lambda: engine.alive and engine.hangs() is None)


def test_a_look_at_the_model_that_does_not_end_is_told_as_well() -> None:
    gate, clock = Gate(), Clock()
    engine = Engine(ScriptedRunner(), max_queue=1, clock=clock)
    engine.start()
    engine.look_with(lambda thorough: gate(None))  # type: ignore[arg-type,func-returns-value]
    assert not engine.inspect(0)
    gate.wait_inside()
    clock.now += 100
    assert engine.hangs() == "a look at the model has been running for 100 s"
    gate.open()
    engine.close()


def test_where_steps_are_slow_a_slow_step_does_not_hang() -> None:
    thread = Doing()
    thread.begin_step(3, 0.0)
    assert thread.hangs(299.0, step_s=30.0) is None
    assert thread.hangs(301.0, step_s=30.0) == "a step of 3 sequences has been running for 301 s"
