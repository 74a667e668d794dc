"""A load that fails, hangs or is killed, and who else may load."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from service.config.gunicorn_hooks import FIXED
from service.errors import DoesNotFit
from service.errors import LoadFailed
from service.errors import ModelUnavailable
from service.errors import PlacementMismatch
from service.errors import PluginError
from service.errors import ServiceError
from tests.server.process import Server
from tests.server.process import wait_for


@pytest.mark.parametrize(
    "error", [LoadFailed, DoesNotFit, ModelUnavailable, PluginError, PlacementMismatch]
)
def test_a_failed_load_ends_the_server_with_the_status_of_its_error_and_one_line(
    error: type[ServiceError], tmp_path: Path
) -> None:
    with Server(tmp_path / "log", FAKE_LOAD=error.__name__) as server:
        assert server.exit_status() == error.exit_status
        lines = server.log().splitlines()
    assert lines[0].partition("Listening at")[1]
    assert [line.partition("[ERROR] ")[2] for line in lines[1:]] == [
        "the fake does not load  fix: use a real one"
    ]


def test_an_app_that_cannot_be_built_is_one_line_too(tmp_path: Path) -> None:
    with Server(tmp_path / "log", FAKE_APP="broken") as server:
        assert server.exit_status() == ModelUnavailable.exit_status
        assert server.log().count("\n") == 2
        assert "there is no such model  fix: fetch it" in server.log()


def test_a_load_that_hangs_does_not_stop_the_heartbeat(tmp_path: Path) -> None:
    with Server(tmp_path / "log", FAKE_LOAD="hang") as server:
        wait_for("the app", lambda: server.port and server.try_get("/ready") == 503)
        (worker,) = server.workers()
        for _ in range(3):
            before = heartbeat(worker.pid)
            wait_for("another one", lambda before=before: heartbeat(worker.pid) > before)
        assert server.workers() == [worker]
        assert server.get("/ready").json == {"state": "loading"}


def heartbeat(pid: int) -> int:
    """When the worker last told its master that it lives: the time of gunicorn's file for that,
    which is open and has no name.
    """
    found = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a connection that was closed meanwhile
            if "/wgunicorn-" in os.readlink(file):
                found.append(file.stat().st_mtime_ns)
    (time_ns,) = found
    return time_ns


def test_a_killed_worker_is_replaced_by_one_that_loads_again(tmp_path: Path) -> None:
    with Server(tmp_path / "log") as server:
        for _ in range(3):
            old = server.ready().worker_pid()
            os.kill(old, signal.SIGKILL)
            wait_for(
                "a fresh worker", lambda old=old: server.try_get("/ready") and _other(server, old)
            )
        assert server.ready().log().count("Moorage is ready") == 4


def _other(server: Server, pid: int) -> bool:
    return [worker.pid for worker in server.workers()] != [pid]


def test_workers_killed_again_and_again_while_loading_end_the_server(tmp_path: Path) -> None:
    with Server(tmp_path / "log", FAKE_LOAD="crash") as server:
        assert server.exit_status() == 1
        assert "2 workers in a row were killed while they loaded" in server.log()
        assert "Reason" not in server.log()


def test_a_dead_engine_answers_and_then_makes_room_for_a_fresh_worker(tmp_path: Path) -> None:
    with Server(tmp_path / "log", TEST_FLUSH_S="60") as server:
        stream, old = server.ready().stream(), server.worker_pid()
        assert server.get("/die", "POST").status == 200
        assert b"error" in stream.read()
        wait_for("a fresh worker", lambda: _other(server, old) and server.try_get("/ready") == 200)
        assert "exited with code 70" in server.log()


def test_a_second_worker_never_loads_beside_the_first(tmp_path: Path) -> None:
    with Server(tmp_path / "log", TEST_EXTRA_WORKER="1") as server:
        first = server.ready().worker_pid()
        server.signal(signal.SIGUSR1)
        server.logged("Another worker of this server owns the model; this one does not load it.")
        server.logged("exited with code 1")
        assert (server.worker_pid(), server.get("/ready").status) == (first, 200)
        assert server.log().count("Moorage is ready") == 1


def test_more_workers_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with Server(tmp_path / "log", "-w", "2") as server:
        assert server.exit_status() == 3
        assert server.log().startswith(f"gunicorn: workers: is 2; {FIXED['workers']}")
        assert "Listening" not in server.log()
    with Server(tmp_path / "log", WEB_CONCURRENCY="4") as server:
        assert server.exit_status() == 3
        assert server.log().startswith("env WEB_CONCURRENCY: is 4;")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--preload"], "preload_app"),
        (["-k", "sync"], "worker_class"),
        (["--threads", "4"], "threads"),
        (["--max-requests", "100"], "max_requests"),
    ],
)
def test_what_gunicorns_command_line_must_not_change_is_refused_by_name(
    arguments: list[str], named: str, tmp_path: Path
) -> None:
    with Server(tmp_path / "log", *arguments) as server:
        assert server.exit_status() == 3
        assert server.log().startswith(f"gunicorn: {named}: is ")


def test_the_worker_gets_its_compute_threads_unless_the_operator_set_them(tmp_path: Path) -> None:
    with Server(tmp_path / "log", OMP_NUM_THREADS="7") as server:
        environment = server.ready().get("/process").json["environment"]
        assert environment == {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "PASSIVE"}


def test_the_ready_line_has_a_curl_for_the_port_it_got(tmp_path: Path) -> None:
    with Server(tmp_path / "log") as server:
        server.ready()
        line = next(line for line in server.log().splitlines() if "Moorage is ready" in line)
        assert f"curl http://127.0.0.1:{server.port}/v1/chat/completions " in line
        assert json.loads(line.rpartition("-d ")[2].strip("'"))["model"] == "fake-model"
