"""What a stop looks like to clients, and what it leaves behind."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.server.process import Server
from tests.server.process import wait_for

# A second for running streams, and then as long as it takes: no seconds that a busy machine spends
# otherwise.
SHORT = {"TEST_GRACE_S": "100", "TEST_RESERVE_S": "99", "TEST_FLUSH_S": "90"}
# The same, and almost no time for what never ends. The master would kill it a minute later.
STUCK = SHORT | {"TEST_FLUSH_S": "0.5"}
# Of hours that running streams have, nothing is left when somebody is impatient.
ENDLESS = {"TEST_GRACE_S": "3600", "TEST_FLUSH_S": "90"}


def gone(children: list[psutil.Process]) -> bool:
    return bool(children) and not any(child.is_running() for child in children)


def test_a_running_stream_finishes_after_sigterm(tmp_path: Path) -> None:
    with Server(tmp_path / "log") as server:
        stream, children = server.ready().stream(), server.workers()
        server.signal(signal.SIGTERM)
        server.logged("Stopping")
        server.get("/finish", "POST")
        assert stream.read() == b"data: last\n\n"
        assert server.exit_status() == 0
        assert gone(children)


def test_while_it_drains_a_new_connection_is_answered_and_told_to_close(tmp_path: Path) -> None:
    with Server(tmp_path / "log") as server:
        stream = server.ready().stream()
        server.signal(signal.SIGTERM)
        server.logged("Stopping")
        answer = wait_for("the drain", lambda: (a := server.get("/ready")).status == 503 and a)
        assert answer.json == {"state": "draining"}
        assert answer.headers["Connection"] == "close"
        server.get("/finish", "POST")
        assert stream.read() == b"data: last\n\n"
        assert server.exit_status() == 0
        assert server.try_get("/ready") is None


def test_a_stream_that_outlasts_the_grace_ends_with_an_error_event(tmp_path: Path) -> None:
    with Server(tmp_path / "log", **SHORT) as server:
        stream, children = server.ready().stream(), server.workers()
        server.signal(signal.SIGTERM)
        assert json.loads(stream.read().removeprefix(b"data: ")) == {"error": "ended"}
        assert server.exit_status() == 0
        assert gone(children)
        assert "SIGKILL" not in server.log()


def test_a_request_that_never_returns_does_not_keep_the_process(tmp_path: Path) -> None:
    with Server(tmp_path / "log", **STUCK) as server:
        server.ready()
        stuck = server.send(b"GET /stuck HTTP/1.1\r\nHost: here\r\n\r\n")
        wait_for("the connection", lambda: server.get("/ready").status == 200)
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        assert "SIGKILL" not in server.log()
        stuck.close()


@pytest.mark.parametrize("drain", ["hang", "raise"])
def test_a_drain_that_is_broken_does_not_keep_the_process(drain: str, tmp_path: Path) -> None:
    with Server(tmp_path / "log", **ENDLESS | {"TEST_FLUSH_S": "0.5"}, FAKE_DRAIN=drain) as server:
        children = server.ready().workers()
        server.signal(signal.SIGINT)
        assert server.exit_status() == 0
        assert gone(children)
        assert "SIGKILL" not in server.log()


def test_a_second_sigterm_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    with Server(tmp_path / "log", **ENDLESS) as server:
        stream = server.ready().stream()
        server.signal(signal.SIGTERM)
        server.logged("Stopping")
        server.signal(signal.SIGTERM)
        assert b"error" in stream.read()
        assert server.exit_status() == 0
        assert "SIGKILL" not in server.log()


def test_an_interrupt_ends_streams_with_their_error_event_at_once(tmp_path: Path) -> None:
    with Server(tmp_path / "log", **ENDLESS) as server:
        stream, children = server.ready().stream(), server.workers()
        # A terminal sends it to master and worker alike.
        children[0].send_signal(signal.SIGINT)
        server.signal(signal.SIGINT)
        assert b"error" in stream.read()
        assert server.exit_status() == 0
        assert gone(children)
        assert "Traceback" not in server.log()


def test_it_stops_while_the_model_is_still_loading(tmp_path: Path) -> None:
    with Server(tmp_path / "log", FAKE_LOAD="hang") as server:
        wait_for("the app", lambda: server.port and server.try_get("/ready") == 503)
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        assert "Traceback" not in server.log()


def test_a_worker_whose_master_was_killed_ends_too(tmp_path: Path) -> None:
    with Server(tmp_path / "log", **ENDLESS) as server:
        stream, children = server.ready().stream(), server.workers()
        server.signal(signal.SIGKILL)
        assert b"error" in stream.read()
        assert psutil.wait_procs(children, 60)[1] == []
