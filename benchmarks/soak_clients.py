"""The clients of the soak: each is one request, good or bad, and says how it ended."""

import http.client
import json
import random
import socket
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 120.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
BUSY = 429


class Improper(Exception):
    """A request had no proper end."""


class Target:
    """The server that is asked."""

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url)
        self.address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.model = model

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)

    def completion(self, chance: random.Random, **fields: Any) -> dict[str, Any]:
        prompt = "word " * chance.randint(1, 60)
        named = {"model": self.model, "prompt": prompt, "max_tokens": chance.randint(1, 60)}
        return named | {"ignore_eos": True} | fields

    def chat(self, chance: random.Random, **fields: Any) -> dict[str, Any]:
        text = " ".join(["Tell me more."] * chance.randint(1, 12))
        messages = [{"role": "user", "content": text}]
        return {"model": self.model, "messages": messages, "max_tokens": 40} | fields


def stream(target: Target, chance: random.Random) -> str:
    """Read to [DONE]."""
    return _streamed(target, CHAT, target.chat(chance, stream=True))


def several(target: Target, chance: random.Random) -> str:
    """Several answers to one question, streamed."""
    body = target.completion(chance, n=3, stream=True, temperature=1.0, max_tokens=20)
    return _streamed(target, COMPLETIONS, body)


def blocking(target: Target, chance: random.Random) -> str:
    status, body = _whole(target, COMPLETIONS, target.completion(chance))
    if status == 200 and json.loads(body)["choices"][0]["finish_reason"] != "length":
        raise Improper(f"no end in {body[:200]!r}")
    return _expected(status, body, 200)


def constrained(target: Target, chance: random.Random) -> str:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    body = target.chat(chance, response_format=wanted, max_tokens=80)
    status, found = _whole(target, CHAT, body)
    if status == 200:
        choice = json.loads(found)["choices"][0]
        if choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])
    return _expected(status, found, 200)


def deadline(target: Target, chance: random.Random) -> str:
    headers = {"X-Request-Timeout-S": f"{chance.uniform(0.05, 0.5):.3f}"}
    body = target.completion(chance, max_tokens=300)
    status, found = _whole(target, COMPLETIONS, body, headers)
    return _expected(status, found, 200, 504)


def late_stream(target: Target, chance: random.Random) -> str:
    headers = {"X-Request-Timeout-S": f"{chance.uniform(0.05, 0.5):.3f}"}
    body = target.completion(chance, max_tokens=300, stream=True)
    return _streamed(target, COMPLETIONS, body, headers, may_end_with="deadline_exceeded")


def leave_stream(target: Target, chance: random.Random) -> str:
    """Read a little, then go."""
    connection = target.connection()
    try:
        _send(connection, COMPLETIONS, target.completion(chance, stream=True, max_tokens=300))
        connection.getresponse().read(chance.randint(1, 500))
    finally:
        connection.close()
    return "left"


def leave_blocking(target: Target, chance: random.Random) -> str:
    """Go before there is an answer, with a reset as often as not."""
    connection = target.connection()
    _send(connection, COMPLETIONS, target.completion(chance, max_tokens=300))
    if chance.random() < 0.5:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    return "left"


def slow_reader(target: Target, chance: random.Random) -> str:
    """Read a stream a little at a time, to its end."""
    connection = target.connection()
    try:
        _send(connection, CHAT, target.chat(chance, stream=True))
        response = connection.getresponse()
        data = b""
        while piece := response.read(64):
            data += piece
        return _expected(response.status, data, 200) if response.status != 200 else _ended(data)
    finally:
        connection.close()


def bad_request(target: Target, chance: random.Random) -> str:
    """Something that must be refused."""
    bodies: list[bytes] = [
        b"\xff\xfe",
        b'{"a": 1, "a": 2}',
        b"[" * 10_000,
        json.dumps(target.completion(chance, max_tokens=100_000)).encode(),
        json.dumps(target.completion(chance, prompt="long " * 3000)).encode(),
        json.dumps(target.chat(chance, messages=[])).encode(),
    ]
    status, body = _whole(target, COMPLETIONS, chance.choice(bodies))
    return _expected(status, body, 400)


def garbage(target: Target, chance: random.Random) -> str:
    """Bytes that are no request; any answer will do, but the connection must end."""
    with socket.create_connection(target.address, PATIENCE_S) as connection:
        try:
            connection.sendall(chance.randbytes(chance.randint(1, 5000)))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        except ConnectionError:
            return "reset"
    return "closed"


def reconnect(target: Target, chance: random.Random) -> str:
    """A connection that is kept for several requests."""
    connection = target.connection()
    try:
        for _ in range(3):
            connection.request("GET", chance.choice(["/health/ready", "/v1/models", "/placement"]))
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise Improper(f"status {response.status}")
    finally:
        connection.close()
    return "200"


KINDS: Mapping[str, Callable[[Target, random.Random], str]] = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        stream,
        several,
        blocking,
        constrained,
        deadline,
        late_stream,
        leave_stream,
        leave_blocking,
        slow_reader,
        bad_request,
        garbage,
        reconnect,
    )
}


def _send(
    connection: http.client.HTTPConnection,
    path: str,
    body: Mapping[str, Any] | bytes,
    headers: Mapping[str, str] | None = None,
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json", **(headers or {})}
    connection.request("POST", path, data, kind)


def _whole(
    target: Target,
    path: str,
    body: Mapping[str, Any] | bytes,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    connection = target.connection()
    try:
        _send(connection, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise Improper(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _streamed(
    target: Target,
    path: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
    may_end_with: str = "",
) -> str:
    status, data = _whole(target, path, body, headers)
    return _expected(status, data, 200) if status != 200 else _ended(data, may_end_with)


def _ended(data: bytes, may_end_with: str = "") -> str:
    """How a stream ended. Raises Improper if it just stopped, or with another error."""
    last = data.rstrip().rpartition(b"\n")[2].removeprefix(b"data: ")
    if last == b"[DONE]":
        return "200"
    try:
        code = str(json.loads(last)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        raise Improper(f"the stream stopped: {data[-200:]!r}") from None
    if code != may_end_with:
        raise Improper(f"the stream ended with {last!r}")
    return code


def _expected(status: int, body: bytes, *wanted: int) -> str:
    """The status in words. Raises Improper for another than was wanted; 429 always may be."""
    if status == BUSY or status in wanted:
        return str(status)
    raise Improper(f"status {status}: {body[:200]!r}")
