"""The stream between an HTTP thread and the engine thread."""

import threading

import pytest

from service.engine.params import SamplingParams
from service.engine.sequence import Sequence
from service.engine.sequence import Stream
from service.errors import EngineStopped
from service.errors import StepFailed


def test_a_read_returns_everything_that_arrived_since_the_last() -> None:
    stream = Stream(3)
    stream.put(7)
    stream.put(8)
    assert stream.read() == [7, 8]
    stream.put(9)
    stream.end("length")
    assert stream.read() == [9]
    assert stream.read() == []
    assert stream.finish_reason == "length"
    assert (stream.prompt_tokens, stream.completion_tokens) == (3, 3)


def test_a_read_times_out_when_nothing_arrives() -> None:
    with pytest.raises(TimeoutError):
        Stream(1).read(timeout_s=0.001)


def test_a_waiting_reader_is_woken_by_a_token_and_by_the_end() -> None:
    stream = Stream(1)
    got: list[list[int]] = []
    first = threading.Event()

    def read() -> None:
        got.append(stream.read(30))
        first.set()
        got.append(stream.read(30))

    reader = threading.Thread(target=read)
    reader.start()
    stream.put(5)
    assert first.wait(30)
    stream.end("stop")
    reader.join(30)
    assert got == [[5], []]


def test_an_error_comes_after_the_tokens_before_it_and_every_time_after() -> None:
    stream = Stream(1)
    stream.put(5)
    stream.fail(StepFailed("broken"))
    assert stream.read() == [5]
    for _ in range(2):
        with pytest.raises(StepFailed, match="broken"):
            stream.read()
    assert stream.finish_reason is None


def test_the_first_end_stands() -> None:
    stream = Stream(1)
    stream.fail(EngineStopped("gone"))
    stream.end("stop")
    stream.fail(StepFailed("late"))
    stream.put(1)
    assert stream.finish_reason is None
    assert stream.completion_tokens == 0
    with pytest.raises(EngineStopped):
        stream.read()

    ended = Stream(1)
    ended.end("stop")
    ended.fail(EngineStopped("late"))
    assert ended.read() == []


def test_cancel_is_a_flag_that_ends_nothing_itself() -> None:
    stream = Stream(1)
    stream.cancel()
    assert stream.cancelled
    assert not stream.ended


@pytest.mark.parametrize(
    ("start", "stop", "ids"),
    [(0, 2, (1, 2)), (2, 5, (3, 4, 5)), (0, 5, (1, 2, 3, 4, 5)), (3, 4, (4,)), (4, 5, (5,))],
)
def test_tokens_are_counted_through_prompt_and_answer(
    start: int, stop: int, ids: tuple[int, ...]
) -> None:
    sequence = Sequence(0, (1, 2, 3), SamplingParams(max_tokens=9), Stream(3), generated=[4, 5])
    assert sequence.known == 5
    assert sequence.ids(start, stop) == ids
