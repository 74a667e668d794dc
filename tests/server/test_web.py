"""The web room under gunicorn: what clients do to it below HTTP, and what its log says."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import LIMIT_S
from tests.server.process import ROOT
from tests.server.process import Server
from tests.server.process import wait_for
from tests.support.fake_deployment import MODEL_ID

CONF = "tests/server/web_conf.py"
OURS = {"MOORAGE_BIND": "127.0.0.1:0", "MOORAGE_THREADS": "16", "MOORAGE_LOG_FORMAT": "json"}


def serving(folder: Path, **environment: str) -> Server:
    return Server(folder / "log", conf=str(ROOT / CONF), cwd=folder, **(OURS | environment))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A patient one: a test that stalls is no slow client."""
    with serving(tmp_path_factory.mktemp("web")) as running:
        yield ready(running)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Gives its clients a second."""
    with serving(tmp_path_factory.mktemp("hasty"), TEST_SOCKET_SECONDS="1") as running:
        yield ready(running)


def ready(server: Server) -> Server:
    wait_for("an answer", lambda: server.port and server.try_get("/health/ready") == 200)
    return server


def post(path: str, body: dict[str, Any], *more: str) -> bytes:
    """One request as bytes."""
    data = json.dumps(body).encode()
    lines = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    head = "\r\n".join([f"POST {path} HTTP/1.1", *lines, *more])
    return head.encode() + b"\r\n\r\n" + data


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hi"}], **fields}


def answer(connection: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response


def lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]


def line_of(server: Server, request_id: str) -> dict[str, Any]:
    def probe() -> dict[str, Any] | None:
        found = [x for x in lines(server) if x.get("request_id") == request_id]
        return found[0] if found else None

    return wait_for(f"the line of {request_id}", probe)


# --- slow bodies


@pytest.mark.parametrize("length", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_body_that_trickles_in_for_ever_is_408(hasty: Server, length: str) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    request = f"{head}Content-Type: application/json\r\n{length}\r\n\r\n"
    connection = hasty.send(request.encode())
    connection.settimeout(0.2)
    piece = b" " if "Length" in length else b"1\r\n \r\n"

    def answered() -> bytes:
        try:
            connection.sendall(piece)  # far more often than one read may take
            return connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return b""

    wait_for("the answer", answered)
    connection.settimeout(LIMIT_S)
    response = answer(connection)
    assert response.status == 408
    assert json.loads(response.read())["error"]["code"] == "sent_too_slowly"
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):  # where the next request would begin is not known
            pass
    connection.close()


def test_a_body_that_stalls_is_408(hasty: Server) -> None:
    connection = hasty.send(post("/tokenize", {"prompt": "abc"})[:-3])
    response = answer(connection)
    assert response.status == 408
    response.read()
    connection.close()


def test_a_body_that_nobody_reads_does_not_hold_its_thread_either(hasty: Server) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
    connection = hasty.send(head)
    connection.settimeout(0.2)

    def ended() -> bool:
        try:
            connection.sendall(b" ")
            return connection.recv(4096) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    wait_for("the end of the connection", ended)
    connection.close()


def test_a_body_of_tiny_chunks_is_a_body(server: Server) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    spaces = b"1\r\n \r\n" * 200_000
    body = spaces + b'10\r\n{"prompt":"abc"}\r\n0\r\n\r\n'
    found = ask(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + body)
    assert json.loads(found)["count"] == 3


# --- connections


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    texts = ["one", "two", "three"]
    requests = [post("/tokenize", {"prompt": text, "return_token_strs": True}) for text in texts]
    requests[1:1] = [post("/v1/chat/completions", chat())]
    connection = server.send(b"".join(requests))
    found = []
    # One buffer for all: each answer of http.client would take some of the next with it.
    data = b""
    while data.count(b"HTTP/1.1 200") < 4 or not data.endswith(b"}\n"):
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    for part in data.split(b"HTTP/1.1 200")[1:]:
        found.append(json.loads(part.partition(b"\r\n\r\n")[2]))
    assert found[1]["choices"][0]["message"]["content"] == "Hello"
    said = [x["token_strs"] for x in (found[0], found[2], found[3])]
    alone = [
        json.loads(ask(server, post("/tokenize", {"prompt": text})))["count"] for text in texts
    ]
    assert [len(x) for x in said] == alone
    connection.close()


def ask(server: Server, request: bytes) -> bytes:
    connection = server.send(request)
    response = answer(connection)
    body = response.read()
    connection.close()
    return body


def test_what_stands_behind_a_body_is_not_taken_for_a_part_of_it(server: Server) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked"
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = server.send(head + both + b"\r\n\r\n0\r\n\r\n" + smuggled)
    response = answer(connection)
    assert response.status == 400
    response.read()
    rest = b""
    while piece := connection.recv(4096):
        rest += piece
    assert rest == b"", "the second request must not be answered"
    connection.close()


def test_a_client_that_closes_its_sending_half_gets_quick_answers(server: Server) -> None:
    connection = server.send(post("/tokenize", {"prompt": "abc"}))
    connection.shutdown(socket.SHUT_WR)
    response = answer(connection)
    assert response.status == 200
    assert json.loads(response.read())["count"] == 3
    connection.close()


# --- log


def test_every_line_of_the_log_is_json_also_those_of_gunicorn(server: Server) -> None:
    ask(server, post("/v1/chat/completions", chat(), "X-Request-Id: in-json"))
    line = line_of(server, "in-json")
    assert (line["status"], line["route"]) == (200, "/v1/chat/completions")
    assert (line["completion_tokens"], line["finish_reason"]) == (5, "stop")
    assert {"time", "level", "pid", "logger", "message"} <= set(line)
    assert line["message"] == "request"
    assert [x for x in server.log().splitlines() if not x.startswith("{")] == []
    listening = [x for x in lines(server) if x["message"].startswith("Listening at")]
    assert listening[0]["logger"] == "gunicorn.error"


def test_a_stream_is_logged_when_it_is_through(server: Server) -> None:
    ask(server, post("/v1/chat/completions", chat(stream=True), "X-Request-Id: streamed"))
    line = line_of(server, "streamed")
    assert (line["finish_reason"], line["prompt_tokens"] > 0) == ("stop", True)
    assert line["seconds"] >= line["first_token_seconds"]


def test_a_stream_whose_client_leaves_is_logged_as_that(tmp_path: Path) -> None:
    with serving(tmp_path, FAKE_ENGINE="hang") as server:
        ready(server)
        body = post("/v1/chat/completions", chat(stream=True), "X-Request-Id: left")
        connection = server.send(body)
        assert b"200" in connection.recv(12)
        connection.close()
        assert line_of(server, "left")["error"] == "client_closed_request"


# --- keys


def test_a_key_that_is_added_works_without_a_restart_and_is_in_no_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice: secret-one\n")
    with serving(tmp_path, MOORAGE_API_KEYS_FILE=str(file)) as server:
        ready(server)

        def status(key: str, request_id: str) -> int:
            more = (f"Authorization: Bearer {key}", f"X-Request-Id: {request_id}")
            connection = server.send(post("/v1/chat/completions", chat(), *more))
            with contextlib.closing(connection), answer(connection) as response:
                response.read()
                return response.status

        assert status("secret-one", "first") == 200
        assert status("secret-two", "unknown") == 401
        new = tmp_path / "new"
        new.write_text("bob: secret-two\n")
        os.replace(new, file)
        wait_for("the new key", lambda: status("secret-two", "trial") == 200)
        assert status("secret-two", "second") == 200
        assert status("secret-one", "old") == 401
        named = {x: line_of(server, x).get("key") for x in ("first", "unknown", "second", "old")}
        assert named == {"first": "alice", "unknown": None, "second": "bob", "old": None}
        assert "secret-" not in server.log()


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    both = str(folder / "both.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-keyout", both, "-out", str(folder / "certificate.pem")]
    try:
        subprocess.run([*command.split(), *names], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate and is not installed")
    with open(both, "ab") as file:
        file.write((folder / "certificate.pem").read_bytes())
    return Path(both)


def test_slow_clients_are_cut_off_under_tls_too(tmp_path: Path, certificate: Path) -> None:
    import ssl

    context = ssl.create_default_context(cafile=str(certificate.parent / "certificate.pem"))
    with serving(tmp_path, TEST_SOCKET_SECONDS="1", TEST_CERTIFICATE=str(certificate)) as server:
        server.logged("Listening at: https://127.0.0.1:")
        found = next(x["message"] for x in lines(server) if "Listening at" in x["message"])
        address = ("127.0.0.1", int(found.partition("127.0.0.1:")[2].split()[0].rstrip(")")))

        def connect() -> ssl.SSLSocket | None:
            """None if the server took the test for a slow client."""
            plain = socket.create_connection(address, LIMIT_S)
            try:
                return context.wrap_socket(plain, server_hostname="localhost")
            except OSError:
                plain.close()
                return None

        # More than there are threads.
        stalled = [socket.create_connection(address, LIMIT_S) for _ in range(20)]
        for each in stalled:  # the first bytes of a handshake, and never the rest
            each.sendall(b"\x16\x03\x01\x02\x00\x01")
        slow = wait_for("a handshake", connect)
        slow.settimeout(0.2)
        unsent = iter([post("/tokenize", {"prompt": "a" * 5000})[:-5000]])

        def ended() -> bool:
            try:
                slow.sendall(next(unsent, b"a"))
                return slow.recv(12) is not None
            except TimeoutError:
                return False
            except OSError:  # the server's TLS was cut off in a record and may send an alert only
                return True

        wait_for("the end of the connection", ended)

        def quick() -> bool:
            connection = connect()
            if connection is None:
                return False
            with connection, contextlib.suppress(OSError, http.client.HTTPException):
                connection.sendall(post("/tokenize", {"prompt": "abc"}))
                with answer(connection) as response:
                    return response.status == 200
            return False

        wait_for("an answer to a client that is not slow", quick)
        for each in [*stalled, slow]:
            each.close()
