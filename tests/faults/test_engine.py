"""Steps that fail: the guilty request is told, its neighbour is not, and the next one works."""

import pytest

from tests.faults.control import LATE
from tests.faults.serving import COMPLETIONS
from tests.faults.serving import Faulty
from tests.faults.serving import completion
from tests.faults.serving import refused
from tests.faults.serving import tells_nothing

LONG = "a" * 300
NEARLY = "a" * 240
STEP_FAILS = [
    ("forward", "raise", "step_failed"),
    ("forward", "memory", "out_of_memory"),
    ("forward", "nan", "non_finite_logits"),
    ("place_inputs", "raise", "step_failed"),
    ("place_inputs", "nothing", "step_failed"),
    ("place_inputs", "list", "step_failed"),
    ("place_inputs", "shape", "step_failed"),
]


@pytest.mark.parametrize(("place", "what", "code"), STEP_FAILS)
def test_a_prompt_whose_step_fails_is_told_and_the_next_one_is_answered(
    server: Faulty, place: str, what: str, code: str
) -> None:
    body = completion(LONG, 4)
    with server.control.during(**{place: {"do": what, "at": LATE}}):
        answer = server.ask(COMPLETIONS, body, X_Request_Id=f"prompt-{place}-{what}")
    refused(answer, 503 if code == "out_of_memory" else 500, code)
    assert ("Retry-After" in answer.headers) == (code == "out_of_memory")
    assert server.line_of(f"prompt-{place}-{what}")["error"] == code
    assert server.ask(COMPLETIONS, body).status == 200


@pytest.mark.parametrize(("place", "what", "code"), STEP_FAILS)
def test_a_stream_whose_step_fails_ends_with_an_event(
    server: Faulty, place: str, what: str, code: str
) -> None:
    with server.control.during(**{place: {"do": what, "at": LATE}}):
        stream = server.stream(NEARLY, 60)
        found = list(stream.events())
    stream.close()
    assert len(found) > 1
    assert found[-1]["error"]["code"] == code
    assert not stream.done
    tells_nothing(str(found))
