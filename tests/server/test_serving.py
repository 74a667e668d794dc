"""What clients and operators do to a server must not stop the next request. One is patient, so that
a test that stalls is no slow client; one gives its clients a second.
"""

import http.client
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.process import Server
from tests.server.process import wait_for

THREADS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server") / "log", TEST_LINGER_S="60") as running:
        yield running.ready()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("hasty") / "log"
    with Server(log, TEST_SOCKET_SECONDS="1") as running:
        yield running.ready()


def answers(server: Server) -> None:
    """Asked again if it takes the test for a slow client."""
    wait_for("an answer", lambda: server.try_get("/ready") == 200)


def answer(connection: socket.socket) -> bytes:
    """Everything until the server says that it is done."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def test_clients_that_do_not_close_do_not_delay_the_next_request(server: Server) -> None:
    request = b"GET /ready HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    idle = [server.send(request) for _ in range(100)]
    # All hundred stay open on our side. gunicorn itself would need 2 s for each of them, and
    # so longer than this waits.
    assert server.get("/ready").status == 200
    for each in idle:
        assert answer(each).startswith(b"HTTP/1.1 200")
        each.close()


@pytest.mark.parametrize(
    "half",
    [
        b"GET /ready HTTP/1.1\r\nHost: he",
        b"POST /length HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\nhalf",
    ],
    ids=["head", "body"],
)
def test_half_sent_requests_let_go_of_their_threads(hasty: Server, half: bytes) -> None:
    stalled = [hasty.send(half) for _ in range(2 * THREADS)]
    answers(hasty)
    for connection in stalled:
        answer(connection)  # ends, because the server gave up
        connection.close()


def test_a_head_that_trickles_in_for_ever_is_cut_off(hasty: Server) -> None:
    connection = hasty.send(b"GET /ready HTTP/1.1\r\nX-Slow: ")
    connection.settimeout(0.2)

    def ended() -> bool:
        try:
            connection.sendall(b"a")
            return connection.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    wait_for("the end of the connection", ended)


def test_a_client_that_never_reads_lets_go_of_its_thread(hasty: Server) -> None:
    wide = b"GET /wide HTTP/1.1\r\nHost: here\r\n\r\n"
    stalled = [hasty.send(wide) for _ in range(THREADS)]
    answers(hasty)
    hasty.logged("A client sent or read nothing for too long; its connection is closed.")
    assert "Socket error processing request" not in hasty.log()  # nor its traceback
    for connection in stalled:
        connection.close()


def test_the_rest_of_a_refused_body_is_taken_so_that_the_answer_arrives(server: Server) -> None:
    connection = server.send(b"POST /nothing HTTP/1.1\r\nHost: here\r\nConnection: close\r\n")
    connection.sendall(b"Content-Length: 4000000\r\n\r\n" + bytes(4_000_000))
    assert answer(connection).startswith(b"HTTP/1.1 404")
    connection.close()


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"what is this\r\n\r\n", 400, "bad_request"),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: here\r\n\r\n", 414, "uri_too_long"),
        (
            b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 10_000 + b"\r\n\r\n",
            431,
            "request_header_fields_too_large",
        ),
    ],
)
def test_what_never_reaches_the_app_is_answered_in_the_one_error_shape(
    server: Server, request_bytes: bytes, status: int, code: str
) -> None:
    connection = server.send(request_bytes)
    response = http.client.HTTPResponse(connection)
    response.begin()
    assert response.status == status
    assert response.headers["Content-Type"] == "application/json"
    error = json.loads(response.read())["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["code"], error["param"]) == (code, None)
    assert error["message"]
    connection.close()


def test_a_connection_is_kept_for_the_next_request(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for _ in range(3):
        connection.request("GET", "/ready")
        response = connection.getresponse()
        response.read()
        assert response.headers["Server"] == "moorage"
    connection.close()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_signals_that_would_start_a_second_copy_are_ignored_aloud(
    server: Server, number: signal.Signals
) -> None:
    pid = server.worker_pid()
    server.signal(number)
    server.logged(f"{number.name} ignored: it would load a second copy")
    assert [worker.pid for worker in server.workers()] == [pid]
    assert server.worker_pid() == pid


def test_one_more_worker_by_signal_is_denied(server: Server) -> None:
    pid = server.worker_pid()
    server.signal(signal.SIGTTIN)
    server.logged("the number of workers stays 1")
    assert [worker.pid for worker in server.workers()] == [pid]


def test_a_closing_terminal_does_not_end_the_worker(server: Server) -> None:
    pid = server.worker_pid()
    (worker,) = server.workers()
    worker.send_signal(signal.SIGHUP)
    wait_for("an answer", lambda: server.try_get("/ready") == 200)
    assert server.worker_pid() == pid


def test_a_unix_socket_is_open_to_its_group_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "moorage.sock"
    with Server(tmp_path / "log", TEST_BIND=f"unix:{path}") as server:
        server.logged(f"curl --unix-socket {path} http://localhost/v1/chat/completions")
        assert path.stat().st_mode & 0o777 == 0o770
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
            assert answer(connection).startswith(b"HTTP/1.1 200")
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
    assert not path.exists()
