"""The real app with a tiny real model under gunicorn, and clients that look closely."""

import contextlib
import functools
import http.client
import json
import re
import socket
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.faults.control import BROKEN_TEXT
from tests.faults.control import REFUSED_TEXT
from tests.faults.control import SECRET
from tests.faults.control import Control
from tests.server.process import LIMIT_S
from tests.server.process import ROOT
from tests.server.process import Answer
from tests.server.process import Server
from tests.server.process import wait_for
from tests.support.tiny import CHATML
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_tokenizer

CONF = str(ROOT / "tests/server/web_conf.py")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SEQUENCES, QUEUE, SLOTS = 4, 4, 16
BODY_BYTES = 200_000
QUIET = "A quiet neighbour"
QUIET_TOKENS = 200
TRAPS = (
    f"{{% if messages[0]['content'] == '{REFUSED_TEXT}' %}}"
    "{{ raise_exception('no such conversation') }}{% endif %}"
    f"{{% if messages[0]['content'] == '{BROKEN_TEXT}' %}}{{{{ 1 // 0 }}}}{{% endif %}}"
)


def save_model(folder: Path, **changes: Any) -> Path:
    """A tiny model whose template refuses one text and breaks on another."""
    save_tiny(folder, **changes)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TRAPS + CHATML
    tokenizer.save_pretrained(folder)
    return folder


def write_config(folder: Path, model: Path, **deployment: Any) -> None:
    """moorage.yaml of a server for these tests."""
    words = {"model": str(model), "max_context": 512, "max_sequences": SEQUENCES} | deployment
    server = {
        "bind": "127.0.0.1:0",
        "threads": SLOTS + 8,
        "max_queue": QUEUE,
        "max_body": BODY_BYTES,
        "grace_s": 5,
        "log_format": "json",
    }
    document = {"version": 1, "server": server, "deployments": {"here": words}}
    (folder / "moorage.yaml").write_text(json.dumps(document))  # JSON is YAML


def faulty(folder: Path, **options: Any) -> dict[str, Any]:
    """The deployment's words for the strategy that `Control.of(folder)` directs."""
    return {
        "strategy": "faulty",
        "strategy_dirs": [str(ROOT / "tests/faults/strategies")],
        "options": {"control": str(folder / "control.json")} | options,
    }


class Faulty(Server):
    """A server whose strategy is `faulty`, and what is in use in it."""

    def __init__(self, folder: Path, model: Path, **deployment: Any) -> None:
        options = deployment.pop("options", {})
        self.control = Control.of(folder)
        write_config(folder, model, **faulty(folder, **options), **deployment)
        environment = {
            "TEST_APP": "service.web.wsgi:build",
            "TEST_SOCKET_SECONDS": "2",
            "TEST_FLUSH_S": "60",
            "TEST_ALL_THREADS": "1",
        }
        super().__init__(folder / "log", conf=CONF, cwd=folder, OMP_NUM_THREADS="1", **environment)

    def ready(self) -> "Faulty":
        def probe() -> bool:
            assert self.process.poll() is None, "the server ended"
            return bool(self.port) and self.try_get("/health/ready") == 200

        wait_for("readiness", probe)
        return self

    # --- asking

    def ask(
        self, path: str, body: Mapping[str, Any] | bytes | None = None, **headers: str
    ) -> Answer:
        """One request and its whole answer; keywords are headers, with _ for -."""
        stream = Stream(self, path, body, **headers)
        with contextlib.closing(stream):
            return Answer(stream.response)

    def stream(self, prompt: str, tokens: int, **fields: Any) -> "Stream":
        """A completion of exactly so many tokens, streamed."""
        return Stream(self, COMPLETIONS, completion(prompt, tokens, stream=True) | fields)

    def metric(self, name: str) -> float:
        """A number of GET /metrics."""
        text = self.get("/metrics").body.decode()
        found = re.search(rf"^moorage:{name}(?:{{.*}})? (\S+)$", text, re.M)
        assert found is not None, f"no {name} in {text}"
        return float(found[1])

    def running(self) -> tuple[int, int]:
        """Sequences that run and that wait."""
        return int(self.metric("num_requests_running")), int(self.metric("num_requests_waiting"))

    def wait_running(self, running: int, waiting: int = 0) -> None:
        wait_for(f"{running} running", lambda: self.running() == (running, waiting))

    def wait_most(self, sequences: int) -> None:
        """No more than these run or wait."""
        wait_for("the others' end", lambda: sum(self.running()) <= sequences)

    # --- looking

    def worker(self) -> psutil.Process:
        """The process that owns the model."""
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def held(self) -> tuple[int, int]:
        """Threads and open files of the worker."""
        worker = self.worker()
        return worker.num_threads(), worker.num_fds()

    def wait_idle(self, threads: int, files: int) -> None:
        """Nothing is in use any more: no sequence, no KV, no more threads and files than before."""

        def probe() -> bool:
            idle = self.running() == (0, 0) and self.metric("kv_tokens_used") == 0
            now = self.held()
            return idle and now[0] <= threads and now[1] <= files

        try:
            wait_for("idle", probe)
        except AssertionError as error:
            facts = (self.running(), self.metric("kv_tokens_used"), self.held(), (threads, files))
            raise AssertionError(f"still in use: {facts}") from error
        assert self.get("/health/ready").status == 200

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        found = self.log().splitlines()
        return [json.loads(line) for line in found if line.startswith("{")]

    def line_of(self, request_id: str) -> dict[str, Any]:
        """The line of that request, written when it is through."""

        def probe() -> dict[str, Any] | None:
            found = (line for line in self.lines() if line.get("request_id") == request_id)
            return next(found, None)

        return wait_for(f"the line of {request_id}", probe)


class Stream:
    """One request whose answer is read as it comes."""

    def __init__(
        self, server: Server, path: str, body: Mapping[str, Any] | bytes | None, **headers: str
    ) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        kind = {"Content-Type": "application/json"} if data is not None else {}
        method = "GET" if data is None else "POST"
        self._connection.request(method, path, data, kind | {"Connection": "close"} | named)
        self.done = False

    @functools.cached_property
    def response(self) -> http.client.HTTPResponse:
        """Waits for the head: of a stream, that is until there is something to say."""
        return self._connection.getresponse()

    def events(self) -> Iterator[dict[str, Any]]:
        """JSON events as they come; `done` says whether [DONE] came."""
        for line in self.response:
            if line == b"data: [DONE]\n":
                self.done = True
            elif line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))

    def close(self) -> None:
        """Leave."""
        if "response" in vars(self):
            self.response.close()
        self._connection.close()


def completion(prompt: str, tokens: int, **fields: Any) -> dict[str, Any]:
    """A greedy completion that no end token cuts."""
    named = {"model": "tiny", "prompt": prompt, "max_tokens": tokens}
    return named | {"temperature": 0, "ignore_eos": True} | fields


def chat(text: str, **fields: Any) -> dict[str, Any]:
    named = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    return named | {"temperature": 0} | fields


def text_of(events: list[dict[str, Any]]) -> str:
    """What the first choice of a completion says."""
    return "".join(c["text"] for e in events for c in e.get("choices", ()) if c["index"] == 0)


def refused(answer: Answer, status: int, code: str, *words: str) -> None:
    """An answer in the one error shape that says what it must and nothing of the inside."""
    assert answer.status == status, answer.body
    error = answer.json["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["code"] == code, error
    for word in words:
        assert word in error["message"], error
    tells_nothing(answer.body.decode())


def tells_nothing(text: str) -> None:
    """Neither a path nor a traceback is in it."""
    for inside in (SECRET, str(ROOT), "Traceback", 'File "', ".py", "/tmp/"):
        assert inside not in text, text


def raw(server: Server, *parts: bytes) -> Answer:
    """The answer to these bytes."""
    connection = server.send(b"".join(parts))
    with contextlib.closing(connection):
        return read(connection)


def read(connection: socket.socket) -> Answer:
    """The next answer on a connection."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return Answer(response)


def head(path: str, *more: str) -> bytes:
    """The head of a POST of JSON."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, "", ""]).encode()
