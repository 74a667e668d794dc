"""The engine thread over a scripted model: admission, ends, failures, drain, close, death."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator

import pytest
import torch

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.scheduler import Batch
from service.engine.sequence import Sequence
from service.engine.slots import Slots
from service.errors import ContextTooLong
from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.errors import InvalidRequest
from service.errors import LoadFailed
from service.errors import NonFiniteLogits
from service.errors import Overloaded
from service.errors import PluginError
from service.errors import StepFailed
from tests.engine.scripted import WAIT_S
from tests.engine.scripted import Gate
from tests.engine.scripted import ScriptedRunner
from tests.engine.scripted import fail_on
from tests.engine.scripted import greedy
from tests.engine.scripted import idle
from tests.engine.scripted import read_all

Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts engines and closes them after the test."""
    engines: list[Engine] = []

    def start(runner: ScriptedRunner, **settings: object) -> Engine:
        engine = Engine(runner, **{"max_queue": 8, **settings})  # type: ignore[arg-type]
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.close()


# --- answers


def test_an_answer_ends_with_length_after_max_tokens(start: Start) -> None:
    engine = start(ScriptedRunner())
    stream = engine.submit([5, 6], greedy(3))
    assert read_all(stream) == [7, 8, 9]
    assert stream.finish_reason == "length"
    assert (stream.prompt_tokens, stream.completion_tokens) == (2, 3)


def test_an_answer_ends_with_stop_before_a_stop_token(start: Start) -> None:
    engine = start(ScriptedRunner())
    stream = engine.submit([5], greedy(10, stop_ids=[8, 50]))
    assert read_all(stream) == [6, 7]
    assert stream.finish_reason == "stop"


def test_long_prompts_go_through_the_model_in_chunks(start: Start) -> None:
    runner = ScriptedRunner(step_tokens=4)
    engine = start(runner)
    assert read_all(engine.submit(range(10), greedy(2))) == [10, 11]
    assert [(ids, at) for _, ids, at in runner.pieces] == [
        ((0, 1, 2, 3), 0),
        ((4, 5, 6, 7), 4),
        ((8, 9), 8),
        ((10,), 10),
    ]


def test_stats_count_what_happens_and_memory_is_freed_before_the_end_is_told(start: Start) -> None:
    gate = Gate()
    engine = start(ScriptedRunner(before_step=gate, max_sequences=1))
    first = engine.submit([1, 2, 3], greedy(2))
    gate.wait_inside()
    second = engine.submit([1], greedy(1))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens) == (1, 1, 0)
    gate.let_one_go()
    assert first.read(WAIT_S) == [4]
    gate.wait_inside()
    assert engine.stats().kv_tokens == 3
    gate.open()
    assert read_all(first) == [5]
    assert read_all(second) == [2]
    assert idle(engine)
    stats = engine.stats()
    assert (stats.steps, stats.tokens, stats.failed) == (3, 3, 0)


def test_one_thread_does_everything_that_touches_the_model(start: Start) -> None:
    runner = ScriptedRunner()
    engine = start(runner)
    streams = [engine.submit([number], greedy(3)) for number in range(5)]
    for stream in streams:
        read_all(stream)
    engine.close()
    assert len(runner.threads) == 1
    assert threading.current_thread() not in runner.threads


# --- admission


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt is empty"),
        ([1, 100], "Token 100 at position 1 .* from 0 to 99"),
        ([-1], "Token -1 at position 0"),
        ([True], "Token True at position 0"),
        ([1.0], "Token 1.0 at position 0"),
        (["a"], "Token 'a' at position 0"),
        ([None], "Token None at position 0"),
    ],
)
def test_a_prompt_the_model_cannot_take_is_refused_before_the_queue(
    start: Start, ids: list[int], message: str
) -> None:
    runner = ScriptedRunner()
    engine = start(runner)
    with pytest.raises(InvalidRequest, match=message) as refused:
        engine.submit(ids, greedy(1))
    assert refused.value.param == "prompt"
    assert runner.steps == []


@pytest.mark.parametrize("max_tokens", [0, -3])
def test_an_answer_without_tokens_is_refused(start: Start, max_tokens: int) -> None:
    engine = start(ScriptedRunner())
    with pytest.raises(InvalidRequest, match=f"max_tokens is {max_tokens}") as refused:
        engine.submit([1], greedy(max_tokens))
    assert refused.value.param == "max_tokens"


def test_prompt_and_answer_fit_the_context_exactly_or_are_refused_in_openais_words(
    start: Start,
) -> None:
    engine = start(ScriptedRunner(capacity=10))
    assert len(read_all(engine.submit([1] * 6, greedy(4)))) == 4
    with pytest.raises(
        ContextTooLong,
        match=r"^This model's maximum context length is 10 tokens\. However, you requested "
        r"11 tokens \(7 in the prompt, 4 in the completion\)\.",
    ):
        engine.submit([1] * 7, greedy(4))


def test_a_full_queue_refuses_at_once_and_takes_again_when_there_is_room(start: Start) -> None:
    gate = Gate()
    engine = start(ScriptedRunner(before_step=gate, max_sequences=1), max_queue=1)
    running = engine.submit([1], greedy(2))
    gate.wait_inside()
    waiting = engine.submit([1], greedy(1))
    with pytest.raises(Overloaded) as refused:
        engine.submit([1], greedy(1))
    assert isinstance(refused.value.retry_after_s, int)
    assert refused.value.retry_after_s >= 1
    gate.open()
    read_all(running)
    read_all(waiting)
    assert read_all(engine.submit([1], greedy(1))) == [2]


def test_nothing_is_taken_before_the_start() -> None:
    engine = Engine(ScriptedRunner(), max_queue=1)
    assert not engine.alive
    with pytest.raises(EngineStopped, match="not been started"):
        engine.submit([1], greedy(1))


# --- cancel and deadline


def test_a_cancelled_stream_stops_at_the_next_step_and_frees_its_memory(start: Start) -> None:
    gate = Gate()
    runner = ScriptedRunner(before_step=gate)
    engine = start(runner)
    stream = engine.submit([1], greedy(500))
    gate.wait_inside()
    stream.cancel()
    gate.open()
    assert read_all(stream) == [2]  # the token of the step that was running
    assert stream.finish_reason == "cancelled"
    assert len(runner.steps) == 1
    assert idle(engine)


def test_a_cancel_is_seen_between_the_chunks_of_a_prompt(start: Start) -> None:
    gate = Gate()
    runner = ScriptedRunner(before_step=gate, step_tokens=4)
    engine = start(runner)
    stream = engine.submit([1] * 400, greedy(1))
    gate.wait_inside()
    stream.cancel()
    gate.open()
    assert read_all(stream) == []
    assert len(runner.steps) == 1


def test_a_cancelled_stream_leaves_the_queue_without_a_step(start: Start) -> None:
    gate = Gate()
    runner = ScriptedRunner(before_step=gate, max_sequences=1)
    engine = start(runner)
    running = engine.submit([1], greedy(2))
    gate.wait_inside()
    waiting = engine.submit([50], greedy(2))
    waiting.cancel()
    gate.let_one_go()
    assert read_all(waiting) == []
    assert waiting.finish_reason == "cancelled"
    gate.open()
    assert read_all(running) == [2, 3]
    assert {sequence_id for sequence_id, _, _ in runner.pieces} == {0}


def test_a_deadline_ends_a_running_and_a_waiting_sequence(start: Start) -> None:
    gate = Gate()
    now = [100.0]
    engine = start(ScriptedRunner(before_step=gate, max_sequences=1), clock=lambda: now[0])
    running = engine.submit([1], greedy(500), deadline=110.0)
    gate.wait_inside()
    waiting = engine.submit([1], greedy(500), deadline=105.0)
    now[0] = 106.0
    gate.let_one_go()
    with pytest.raises(DeadlineExceeded):
        read_all(waiting)
    assert not running.ended
    now[0] = 110.0
    gate.open()
    assert running.read(WAIT_S)[0] == 2
    with pytest.raises(DeadlineExceeded):
        read_all(running)
    assert idle(engine)


# --- failures


@pytest.mark.parametrize(
    "error",
    [RuntimeError("secret path /srv/x"), ValueError("secret"), PluginError("secret options")],
)
def test_a_step_that_raises_fails_only_its_sequence_and_tells_the_log(
    start: Start, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    engine = start(ScriptedRunner(before_step=fail_on(66, error)))
    good = engine.submit([1], greedy(20))
    bad = engine.submit([64], greedy(20))
    assert bad.read(WAIT_S)
    with caplog.at_level(logging.ERROR), pytest.raises(StepFailed) as failed:
        read_all(bad)
    assert "secret" not in str(failed.value.as_dict())
    assert read_all(good) == list(range(2, 22))
    assert "secret" in caplog.text
    assert engine.alive
    assert idle(engine)
    assert engine.stats().failed == 1


def test_logits_that_are_not_finite_fail_only_their_sequence(start: Start) -> None:
    engine = start(ScriptedRunner(sick=66))
    good = engine.submit([1], greedy(20))
    bad = engine.submit([66], greedy(20))
    with pytest.raises(NonFiniteLogits):
        read_all(bad)
    assert len(read_all(good)) == 20
    assert engine.alive


def test_parameters_out_of_range_are_refused_before_the_queue(start: Start) -> None:
    engine = start(ScriptedRunner())
    with pytest.raises(InvalidRequest, match=r"top_p is 2.0; give from 0 to 1") as refused:
        engine.submit([1], SamplingParams(max_tokens=3, top_p=2.0))
    assert refused.value.param == "top_p"
    assert read_all(engine.submit([1], greedy(1))) == [2]


class Breaks:
    """A constraint with a fault of its own."""

    def allowed(self) -> torch.Tensor | None:
        raise KeyError("state 7")

    def accept(self, token: int) -> None:
        raise AssertionError("nothing was chosen")


def test_a_constraint_that_raises_fails_its_sequence_only(start: Start) -> None:
    gate = Gate()
    engine = start(ScriptedRunner(before_step=gate))
    good = engine.submit([1], greedy(20))
    gate.wait_inside()
    bad = engine.submit([1], SamplingParams(max_tokens=3, constraint=Breaks()))
    gate.open()
    with pytest.raises(StepFailed, match="constraint of this request raised KeyError"):
        read_all(bad)
    assert read_all(good) == list(range(2, 22))


def test_a_batch_that_fails_is_run_in_halves_until_the_guilty_one_is_found(start: Start) -> None:
    gate = Gate()
    poison = fail_on(66, RuntimeError("guilty"))

    def before_step(batch: Batch) -> None:
        gate(batch)
        poison(batch)

    runner = ScriptedRunner(before_step=before_step, max_sequences=8)
    engine = start(runner)
    first = engine.submit([99], greedy(30))
    gate.wait_inside()
    good = [engine.submit([10 * number], greedy(30)) for number in range(6)]
    bad = engine.submit([60], greedy(30))
    gate.open()
    with pytest.raises(StepFailed):
        read_all(bad)
    assert bad.completion_tokens == 6
    assert read_all(first)[:3] == [0, 1, 2]
    for number, stream in enumerate(good):
        tokens = [(10 * number + more) % 100 for more in range(1, 31)]
        if 66 in tokens[:-1]:
            with pytest.raises(StepFailed):
                read_all(stream)
            assert stream.completion_tokens == tokens.index(66) + 1
        else:
            assert read_all(stream) == tokens
    assert engine.stats().failed == 3
    assert idle(engine)


def test_after_several_failures_in_a_row_the_model_is_tried_and_serves_on_if_it_works(
    start: Start,
) -> None:
    runner = ScriptedRunner(before_step=fail_on(66, RuntimeError("guilty prompt")))
    engine = start(runner)
    assert runner.trials == 1
    for _ in range(6):
        with pytest.raises(StepFailed):
            read_all(engine.submit([66], greedy(1)))
        assert read_all(engine.submit([1], greedy(1))) == [2]
    assert runner.trials == 1  # a success between them: not in a row
    for _ in range(3):
        with pytest.raises(StepFailed):
            read_all(engine.submit([66], greedy(1)))
    assert read_all(engine.submit([1], greedy(1))) == [2]
    assert runner.trials == 2
    assert engine.alive


def test_an_engine_whose_model_is_broken_for_everyone_dies_instead_of_failing_for_ever(
    start: Start,
) -> None:
    runner = ScriptedRunner(before_step=fail_on(66, RuntimeError("device lost")))
    deaths: list[BaseException] = []
    died = threading.Event()
    engine = start(runner, on_death=lambda error: (deaths.append(error), died.set()))
    runner.broken = LoadFailed("device lost")
    for error in (StepFailed, StepFailed, EngineStopped):
        with pytest.raises(error):
            read_all(engine.submit([66], greedy(1)))
    assert died.wait(WAIT_S)
    assert deaths == [runner.broken]
    assert not engine.alive


# --- start


@pytest.mark.parametrize("error", [LoadFailed("no"), PluginError("no"), SystemExit(3)])
def test_a_warm_up_that_fails_is_raised_by_start_and_is_no_death(error: BaseException) -> None:
    runner = ScriptedRunner()
    runner.broken = error
    deaths: list[BaseException] = []
    engine = Engine(runner, max_queue=1, on_death=deaths.append)
    with pytest.raises(type(error)):
        engine.start()
    assert not engine.alive
    with pytest.raises(EngineStopped):
        engine.submit([1], greedy(1))
    engine.close()
    assert deaths == []


def test_an_engine_starts_once(start: Start) -> None:
    engine = start(ScriptedRunner())
    with pytest.raises(RuntimeError, match="started once"):
        engine.start()
    engine.close()
    with pytest.raises(RuntimeError, match="not after its end"):
        engine.start()


# --- drain and close


def test_a_drain_refuses_new_prompts_and_lets_the_accepted_finish(start: Start) -> None:
    gate = Gate()
    engine = start(ScriptedRunner(before_step=gate, max_sequences=1))
    running, waiting = engine.submit([1], greedy(3)), engine.submit([10], greedy(2))
    gate.wait_inside()
    finished: list[bool] = []
    drainer = threading.Thread(target=lambda: finished.append(engine.drain(100 * WAIT_S)))
    drainer.start()
    while not _refused(engine):
        pass
    gate.open()
    assert read_all(running) == [2, 3, 4]
    assert read_all(waiting) == [11, 12]
    drainer.join(WAIT_S)
    assert finished == [True]
    assert engine.alive


def _refused(engine: Engine) -> bool:
    """Whether the engine refuses prompts; an accepted one is withdrawn."""
    try:
        engine.submit([1], greedy(1)).cancel()
    except EngineStopped as error:
        return "shutting down" in error.message
    except Overloaded:
        return False
    return False


def test_a_drain_ends_the_rest_at_its_deadline_even_inside_a_step(start: Start) -> None:
    gate = Gate()
    engine = start(ScriptedRunner(before_step=gate, max_sequences=1))
    running, waiting = engine.submit([1], greedy(3)), engine.submit([1], greedy(3))
    gate.wait_inside()
    assert engine.drain(0.0) is False
    for stream in (running, waiting):
        with pytest.raises(EngineStopped, match="shutting down"):
            stream.read(WAIT_S)
    gate.open()
    engine.close()
    assert idle(engine)


def test_an_idle_engine_drains_at_once(start: Start) -> None:
    engine = start(ScriptedRunner())
    read_all(engine.submit([1], greedy(2)))
    assert engine.drain(WAIT_S) is True


def test_close_ends_every_stream_frees_all_memory_and_may_be_repeated(start: Start) -> None:
    gate = Gate()
    runner = ScriptedRunner(before_step=gate, max_sequences=2)
    engine = start(runner)
    streams = [engine.submit([1], greedy(50)) for _ in range(4)]
    gate.wait_inside()
    closer = threading.Thread(target=engine.close)
    closer.start()
    for stream in streams:
        with pytest.raises(EngineStopped):
            stream.read(WAIT_S)
    gate.open()
    closer.join(WAIT_S)
    engine.close()
    assert not closer.is_alive()
    assert not engine.alive
    assert runner.memory.used_tokens == 0
    with pytest.raises(EngineStopped, match="closed"):
        engine.submit([1], greedy(1))


def test_close_does_not_wait_for_ever_for_a_step_that_hangs(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    engine = start(ScriptedRunner(before_step=gate))
    stream = engine.submit([1], greedy(50))
    gate.wait_inside()
    engine.close(timeout_s=0.0)
    assert "still in a step" in caplog.text
    with pytest.raises(EngineStopped):
        stream.read(WAIT_S)
    gate.open()


# --- death


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_when_the_engine_thread_dies_all_streams_end_and_on_death_is_called_once(
    start: Start, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    gate = Gate()
    deaths: list[tuple[BaseException, bool]] = []
    died = threading.Event()

    def before_step(batch: Batch) -> None:
        gate(batch)
        raise error

    def on_death(why: BaseException) -> None:
        deaths.append((why, all(stream.ended for stream in streams)))
        died.set()

    engine = start(ScriptedRunner(before_step=before_step, max_sequences=2), on_death=on_death)
    streams = [engine.submit([1], greedy(5)) for _ in range(4)]
    gate.wait_inside()
    gate.open()
    for stream in streams:
        with pytest.raises(EngineStopped, match="stopped after an error"):
            read_all(stream)
    assert died.wait(WAIT_S)
    assert deaths == [(error, True)]
    assert not engine.alive
    with pytest.raises(EngineStopped, match="stopped after an error"):
        engine.submit([1], greedy(1))
    assert engine.drain(WAIT_S) is False
    engine.close()
    assert len(deaths) == 1
    assert "engine thread died" in caplog.text


def test_running_out_of_memory_in_the_loop_itself_is_a_death_too(start: Start) -> None:
    class Leaky(Slots):
        def free(self, sequence: Sequence, *, failed: bool = False) -> None:
            super().free(sequence, failed=failed)
            if sequence.id >= 0:
                raise MemoryError

    runner = ScriptedRunner()
    runner.memory = Leaky(2, share=True)
    died = threading.Event()
    engine = start(runner, on_death=lambda error: died.set())
    # both at once: the first to end is the end of the engine
    short, long = engine.submit_all([([1], greedy(1)), ([5], greedy(900))])
    assert read_all(short) == [2]  # it had its whole answer
    with pytest.raises(EngineStopped):
        read_all(long)
    assert died.wait(WAIT_S)
    assert not engine.alive


def test_importing_the_engine_does_not_import_torch() -> None:
    code = "import sys, service.engine.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
