"""More than there is room or time for: told when to come back, and nobody else waits for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.serving import COMPLETIONS
from tests.faults.serving import QUEUE
from tests.faults.serving import SEQUENCES
from tests.faults.serving import Faulty
from tests.faults.serving import Stream
from tests.faults.serving import completion
from tests.faults.serving import refused
from tests.faults.serving import tells_nothing
from tests.faults.serving import text_of

LONGEST = 400
LATE_CODE = "deadline_exceeded"


def fill(server: Faulty, waiting: int) -> list[Stream]:
    """Long streams beside the neighbour: all that run, and so many that wait."""
    streams = [server.stream("busy", LONGEST) for _ in range(SEQUENCES - 1 + waiting)]
    server.wait_running(SEQUENCES, waiting)
    return streams


def leave(streams: list[Stream]) -> None:
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_and_says_when_to_come_back(server: Faulty, stream: bool) -> None:
    others = fill(server, QUEUE)
    answer = server.ask(COMPLETIONS, completion("a", 1, stream=stream))
    leave(others)
    refused(answer, 429, "queue_full", f"{SEQUENCES} sequences are running")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_in_the_queue_is_504(server: Faulty, stream: bool) -> None:
    others = fill(server, 0)
    body = completion("a", 1, stream=stream)
    answer = server.ask(COMPLETIONS, body, X_Request_Timeout_S="0.3")
    leave(others)
    text = answer.body.decode()
    assert answer.status == (200 if stream else 504)
    assert LATE_CODE in text
    assert "[DONE]" not in text
    tells_nothing(text)


def test_a_deadline_within_an_answer_is_504(server: Faulty) -> None:
    body = completion("a", LONGEST)
    answer = server.ask(COMPLETIONS, body, X_Request_Timeout_S="0.3")
    refused(answer, 504, LATE_CODE, "longer than it was given")
    server.wait_most(1)


def test_a_deadline_within_a_stream_is_an_event(server: Faulty) -> None:
    body = completion("a", LONGEST, stream=True)
    stream = Stream(server, COMPLETIONS, body, X_Request_Timeout_S="5")
    events = list(stream.events())
    stream.close()
    assert text_of(events)
    assert events[-1]["error"]["code"] == LATE_CODE
    assert not stream.done
    server.wait_most(1)


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Faulty]:
    """A server with pages for little more than one whole context."""
    folder = tmp_path_factory.mktemp("paged")
    words = {"options": {"paged": True}, "kv_tokens": 512}
    with Faulty(folder, model, **words) as server:
        yield server.ready()


def test_out_of_pages_the_newest_give_way_and_every_answer_is_the_one_it_would_be(
    paged: Faulty,
) -> None:
    prompts = [f"prompt {number}" for number in range(SEQUENCES)]
    bodies = [completion(prompt, 250, stream=True) for prompt in prompts]
    alone = [text_of(list(Stream(paged, COMPLETIONS, body).events())) for body in bodies]
    assert "gives way" not in paged.log()
    streams = [Stream(paged, COMPLETIONS, body) for body in bodies]
    together = [text_of(list(stream.events())) for stream in streams]
    for stream in streams:
        assert stream.done
        stream.close()
    assert together == alone
    assert "a sequence gives way" in paged.log()
    paged.wait_idle(10_000, 10_000)
