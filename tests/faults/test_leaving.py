"""Clients that leave, in every phase: the work stops, and the log says who ended it."""

import json
import socket

from tests.faults.serving import CHAT
from tests.faults.serving import COMPLETIONS
from tests.faults.serving import SEQUENCES
from tests.faults.serving import Faulty
from tests.faults.serving import Stream
from tests.faults.serving import chat
from tests.faults.serving import completion
from tests.faults.serving import head
from tests.server.process import wait_for

GONE = "client_closed_request"
LONGEST = 400
"""Tokens. Far more than a test waits for at the pace of these tests."""


def test_a_client_that_leaves_the_queue_never_runs(server: Faulty) -> None:
    others = [server.stream("busy", LONGEST) for _ in range(SEQUENCES - 1)]
    server.wait_running(SEQUENCES)
    body = chat("wait", max_tokens=LONGEST, stream=True)
    waiting = Stream(server, CHAT, body, X_Request_Id="left-queue")
    server.wait_running(SEQUENCES, 1)
    waiting.close()
    wait_for("an empty queue", lambda: server.running()[1] == 0)
    line = server.line_of("left-queue")
    assert (line["error"], line["completion_tokens"]) == (GONE, 0)
    for other in others:
        other.close()


def test_a_client_that_leaves_the_queue_without_a_stream_never_runs(server: Faulty) -> None:
    others = [server.stream("busy", LONGEST) for _ in range(SEQUENCES - 1)]
    server.wait_running(SEQUENCES)
    body = completion("wait", LONGEST)
    waiting = Stream(server, COMPLETIONS, body, X_Request_Id="left-blocking-queue")
    server.wait_running(SEQUENCES, 1)
    waiting.close()
    wait_for("an empty queue", lambda: server.running()[1] == 0)
    assert server.line_of("left-blocking-queue")["error"] == GONE
    for other in others:
        other.close()


def test_a_client_that_leaves_during_its_prompt_gets_no_further(server: Faulty) -> None:
    with server.control.during(forward={"do": "hold"}):
        body = chat("a" * 400, max_tokens=50, stream=True)
        leaving = Stream(server, CHAT, body, X_Request_Id="left-prefill")
        wait_for("it is known", lambda: sum(server.running()) == 2)
        leaving.close()
        line = server.line_of("left-prefill")
    assert (line["error"], line["completion_tokens"]) == (GONE, 0)
    server.wait_most(1)


def test_a_client_that_leaves_its_stream_frees_its_place(server: Faulty) -> None:
    body = completion("go on", LONGEST, stream=True)
    leaving = Stream(server, COMPLETIONS, body, X_Request_Id="left-decode")
    next(leaving.events())
    leaving.close()
    line = server.line_of("left-decode")
    assert line["error"] == GONE
    assert line["completion_tokens"] < LONGEST
    server.wait_most(1)


def test_a_client_that_leaves_before_its_whole_answer_frees_its_place(server: Faulty) -> None:
    leaving = Stream(server, COMPLETIONS, completion("a", LONGEST), X_Request_Id="left-blocking")
    server.wait_running(2)
    leaving.close()
    assert server.line_of("left-blocking")["error"] == GONE
    server.wait_most(1)


def test_a_client_that_resets_its_stream_frees_its_place(server: Faulty) -> None:
    data = json.dumps(completion("go on", LONGEST, stream=True)).encode()
    length = f"Content-Length: {len(data)}"
    connection = server.send(head(COMPLETIONS, length, "X-Request-Id: left-reset") + data)
    assert connection.recv(100)
    # closing with this option is a reset, not an end
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    assert server.line_of("left-reset")["error"] == GONE
    server.wait_most(1)


def test_a_client_that_leaves_between_the_chunks_of_its_body_costs_nothing(server: Faulty) -> None:
    chunked = ("Transfer-Encoding: chunked", "X-Request-Id: left-chunks")
    connection = server.send(head(COMPLETIONS, *chunked) + b'a\r\n{"model": \r\n')
    connection.close()
    assert server.line_of("left-chunks")["status"] == 400


def test_a_client_that_leaves_within_its_head_costs_nothing(server: Faulty) -> None:
    server.send(b"POST /v1/completions HTTP/1.1\r\nHost: loc").close()
    server.send(b"").close()
    assert server.get("/health/ready").status == 200
