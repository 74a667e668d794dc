"""What is done to connections below HTTP: slow, half closed, stuffed, flooded."""

import contextlib
import json
import socket
import time

import pytest

from tests.faults.serving import CHAT
from tests.faults.serving import COMPLETIONS
from tests.faults.serving import SEQUENCES
from tests.faults.serving import SLOTS
from tests.faults.serving import Faulty
from tests.faults.serving import chat
from tests.faults.serving import completion
from tests.faults.serving import head
from tests.faults.serving import raw
from tests.faults.serving import read
from tests.faults.serving import refused
from tests.faults.serving import tells_nothing
from tests.server.process import LIMIT_S
from tests.server.process import Answer
from tests.server.process import wait_for

LARGE = "request_header_fields_too_large"


def request(path: str, body: dict[str, object], *more: str) -> bytes:
    data = json.dumps(body).encode()
    return head(path, f"Content-Length: {len(data)}", *more) + data


def test_pipelined_requests_are_answered_in_order(server: Faulty) -> None:
    asked = [request("/tokenize", {"prompt": "a" * count}) for count in (1, 2)]
    asked.insert(1, request(COMPLETIONS, completion("a", 3)))
    connection = server.send(b"".join(asked))
    data = b""
    while data.count(b"HTTP/1.1 200") < 3 or not data.endswith(b"}\n"):
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    connection.close()
    parts = [part.partition(b"\r\n\r\n")[2] for part in data.split(b"HTTP/1.1 200")[1:]]
    first, second, third = map(json.loads, parts)
    assert (first["count"], third["count"]) == (1, 2)
    assert second["usage"]["completion_tokens"] == 3


def test_a_half_closed_connection_gets_a_quick_answer(server: Faulty) -> None:
    connection = server.send(request("/tokenize", {"prompt": "abc"}))
    connection.shutdown(socket.SHUT_WR)
    assert read(connection).json["count"] == 3
    connection.close()


def test_a_half_closed_connection_is_taken_as_left_by_a_long_answer(server: Faulty) -> None:
    body = completion("a", 400, stream=True)
    connection = server.send(request(COMPLETIONS, body, "X-Request-Id: half-closed"))
    connection.shutdown(socket.SHUT_WR)
    assert server.line_of("half-closed")["error"] == "client_closed_request"
    server.wait_most(1)
    connection.close()


def test_a_client_that_never_reads_its_stream_is_dropped(server: Faulty) -> None:
    body = chat("go on", max_tokens=400, stream=True, ignore_eos=True, n=SEQUENCES - 1)
    body |= {"logprobs": True, "top_logprobs": 20}
    connection = socket.socket()
    # Segments on loopback have 64 KB, and the kernel keeps room for many before a write waits: the
    # whole answer, if the client did not ask for shorter ones.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with contextlib.closing(connection):
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(CHAT, body, "X-Request-Id: never-reads"))
        line = server.line_of("never-reads")
    assert (line["status"], line["error"]) == (200, "client_closed_request")
    assert 0 < line["completion_tokens"] < 400 * (SEQUENCES - 1)
    server.wait_most(1)


@pytest.mark.parametrize("sent", ["head", "body", "chunks"])
def test_a_sender_that_trickles_is_cut_off(server: Faulty, sent: str) -> None:
    started = {
        "head": b"POST /v1/completions HTTP/1.1\r\nX-Slow: ",
        "body": head(COMPLETIONS, "Content-Length: 100000"),
        "chunks": head(COMPLETIONS, "Transfer-Encoding: chunked"),
    }
    piece = b"1\r\n \r\n" if sent == "chunks" else b" "
    connection = server.send(started[sent])
    connection.settimeout(0.1)
    found = b""

    def ended() -> bool:
        nonlocal found
        with contextlib.suppress(TimeoutError):
            try:
                connection.sendall(piece)
                found += (new := connection.recv(65536))
                return new == b""
            except ConnectionError:
                return True
        return False

    wait_for("the end of the connection", ended)
    connection.close()
    tells_nothing(found.decode())
    if sent != "head":
        assert found.startswith(b"HTTP/1.1 408")
        assert b"sent_too_slowly" in found


def test_more_half_sent_heads_than_threads_do_not_keep_others_out(server: Faulty) -> None:
    stalled = [server.send(b"GET / HTTP/1.1\r\nX: ") for _ in range(2 * (SLOTS + 8))]
    assert server.ask(COMPLETIONS, completion("a", 2)).status == 200
    for connection in stalled:
        connection.close()


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        ([f"X-{number}: a" for number in range(100)], 431, LARGE),
        (["X-Long: " + "a" * 9000], 431, LARGE),
    ],
    ids=["many", "long"],
)
def test_a_flood_of_headers_is_refused(
    server: Faulty, lines: list[str], status: int, code: str
) -> None:
    refused(raw(server, head(COMPLETIONS, *lines)), status, code)


def test_an_endless_head_is_cut_off_before_it_fills_the_memory(server: Faulty) -> None:
    worker = server.worker()
    before = worker.memory_info().rss
    connection = socket.create_connection(("127.0.0.1", server.port), LIMIT_S)
    sent, end = 0, time.monotonic() + LIMIT_S
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\n")
        while time.monotonic() < end and sent < 200 * 2**20:
            sent += connection.send(b"X-More: " + b"a" * 4000 + b"\r\n")
    assert sent < 200 * 2**20
    assert worker.memory_info().rss - before < 50 * 2**20


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"\0" * 100, b"what\r\n\r\n"])
def test_what_is_not_http_is_answered_or_closed(server: Faulty, garbage: bytes) -> None:
    connection = server.send(garbage)
    connection.shutdown(socket.SHUT_WR)
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    connection.close()
    assert data == b"" or data.startswith(b"HTTP/1.1 400")
    tells_nothing(data.decode())


def test_both_length_and_chunks_are_refused(server: Faulty) -> None:
    smuggled = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    both = ("Content-Length: 5", "Transfer-Encoding: chunked")
    connection = server.send(head(COMPLETIONS, *both) + smuggled)
    answer: Answer = read(connection)
    refused(answer, 400, "bad_request")
    with contextlib.suppress(ConnectionError):
        assert connection.recv(4096) == b"", "the second request must not be answered"
    connection.close()
