"""The worker is killed, its engine dies or hangs, its clock jumps."""

import contextlib
import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.control import ALL
from tests.faults.serving import COMPLETIONS
from tests.faults.serving import Faulty
from tests.faults.serving import completion
from tests.faults.serving import refused
from tests.faults.serving import text_of
from tests.server.process import wait_for

YEAR_S = 365 * 86400.0
SLOW_S = 0.1
"""Of a step: a long stream takes far longer than a test to act while it runs."""


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Faulty]:
    """A server whose worker may end."""
    with Faulty(tmp_path_factory.mktemp("mortal"), model) as server:
        server.control.always = {"step_s": 0.003}
        server.control.write()
        yield server.ready()


def wait_again(server: Faulty, before: int) -> None:
    """A fresh worker answers as the one before."""
    wait_for("a fresh worker", lambda: any(w.pid != before for w in server.workers()))
    server.ready()
    assert server.worker().pid != before
    assert server.ask(COMPLETIONS, completion("a", 4)).status == 200
    server.wait_idle(10_000, 10_000)


def test_a_killed_worker_cuts_its_streams_and_a_fresh_one_is_ready_again(mortal: Faulty) -> None:
    before = mortal.worker().pid
    with mortal.control.during(step_s=SLOW_S):
        stream = mortal.stream("a", 400)
        events = stream.events()
        next(events)
        mortal.worker().kill()
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
            list(events)
    stream.close()
    assert not stream.done, "a stream that was cut must not look complete"
    wait_again(mortal, before)


def test_an_engine_that_dies_tells_everybody_and_a_fresh_worker_is_ready_again(
    mortal: Faulty,
) -> None:
    before = mortal.worker().pid
    mortal.control.write(forward={"do": "hold"})
    streams = [mortal.stream("a", 400) for _ in range(6)]  # running and waiting ones
    wait_for("all of them", lambda: sum(mortal.running()) == 6)
    mortal.control.write(forward={"do": "leave", "at": ALL})
    found = [list(stream.events()) for stream in streams]
    mortal.control.write()
    for stream, events in zip(streams, found, strict=True):
        assert events[-1]["error"]["code"] == "engine_stopped"
        assert not stream.done
        stream.close()
    wait_again(mortal, before)
    assert "the engine thread died" in mortal.log()
    assert "a fresh one loads the model again" in mortal.log()


def test_a_model_that_fails_every_step_is_loaded_again(mortal: Faulty) -> None:
    before = mortal.worker().pid
    with mortal.control.during(forward={"do": "raise", "at": ALL}):
        for _ in range(3):
            with contextlib.suppress(OSError, http.client.HTTPException):
                answer = mortal.ask(COMPLETIONS, completion("a", 4))
                assert answer.status in (500, 503)
        wait_for("its end", lambda: all(w.pid != before for w in mortal.workers()))
    wait_again(mortal, before)


def test_a_server_whose_step_hangs_is_not_ready_until_it_ends(mortal: Faulty) -> None:
    mortal.control.write(step_s=SLOW_S)
    stream = mortal.stream("a", 200)
    events = stream.events()
    next(events)
    with mortal.control.during(forward={"do": "hold"}, hangs_after_s=0.2):
        wait_for("it is seen", lambda: mortal.try_get("/health/ready") == 503)
        refused(
            mortal.get("/health/ready"), 503, "not_ready", "a step of 1 sequence has been running"
        )
        assert "a step of 1 sequence" in mortal.get("/placement").json["engine"]["hangs"]
        assert mortal.get("/health/live").status == 200
    mortal.ready()
    list(events)
    assert stream.done
    stream.close()
    assert mortal.get("/placement").json["engine"]["hangs"] is None


def test_a_place_inputs_that_hangs_does_not_keep_requests_beyond_their_deadline(
    mortal: Faulty,
) -> None:
    with mortal.control.during(place_inputs={"do": "hold"}):
        answer = mortal.ask(COMPLETIONS, completion("a", 4), X_Request_Timeout_S="0.5")
        assert mortal.get("/health/live").status == 200
    refused(answer, 504, "deadline_exceeded")
    mortal.wait_idle(10_000, 10_000)
    assert mortal.ask(COMPLETIONS, completion("a", 4)).status == 200


@pytest.mark.parametrize("clock_s", [YEAR_S, -YEAR_S])
def test_a_clock_that_jumps_ends_nothing(mortal: Faulty, clock_s: float) -> None:
    body = completion("a", 100, stream=True)
    alone = text_of(list(mortal.stream("a", 100).events()))
    stream = mortal.stream("a", 100)
    events = stream.events()
    first = next(events)
    with mortal.control.during(clock_s=clock_s):
        waiting = mortal.ask(COMPLETIONS, body, X_Request_Timeout_S="60")
        assert mortal.get("/health/ready").status == 200
        assert text_of([first, *events]) == alone
    assert stream.done
    stream.close()
    assert b"[DONE]" in waiting.body
    mortal.wait_idle(10_000, 10_000)
