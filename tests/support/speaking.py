"""A small server that speaks OpenAI's HTTP, and does what the last message says."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any

KEY = "right"


class Speaks(BaseHTTPRequestHandler):
    """The last message begins with a word that says what happens; any other text is answered with
    as many pieces as asked for. `server.asked` has the bodies.
    """

    server: "Server"

    def do_GET(self) -> None:
        if self.headers.get("Authorization") not in (None, f"Bearer {KEY}"):
            self._refuse(401, "that key is wrong")
        elif self.path == "/v1/models":
            self._json(200, {"data": [{"id": name} for name in self.server.models]})
        else:
            self._refuse(404, f"nothing at {self.path}")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        word = asked["messages"][-1]["content"].partition(" ")[0]
        if asked.get("ignore_eos") and self.server.strict:
            self._refuse(400, "Unrecognized request argument supplied: ignore_eos")
        elif self.server.busy:
            self._refuse(429, "too many", ("Retry-After", "7"))
        else:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self._answer(word, asked)

    def _answer(self, word: str, asked: dict[str, Any]) -> None:
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if word == "forever":
            while True:
                self._text("on and on ")
                self.server.pause.wait(0.01)
        if word == "escape":
            self._text("a\x1b]0;title\x07b\x9b31m\u202ec\ud83d\n")
        elif word == "think":
            self._event({"choices": [{"delta": {"reasoning_content": "hm"}}]})
            self._text("yes")
        elif word == "break":
            self._text("half")
            self._event({"error": {"message": "it broke\x1b[2J"}})
            return
        elif word == "stop":
            self._text("half")
            return
        else:
            self.server.pause.wait(self.server.first_s)
            for _ in range(asked.get("max_tokens", 3)):
                self._text("word ")
        self._event({"choices": [{"delta": {}, "finish_reason": self.server.reason}]})
        if self.server.counts:
            words = sum(len(m["content"].split()) for m in asked["messages"])
            came = asked.get("max_tokens", 3)
            usage = {"prompt_tokens": 5 + 2 * words, "completion_tokens": came}
            self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _text(self, text: str) -> None:
        self._event({"choices": [{"delta": {"content": text}}]})

    def _event(self, document: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")
        self.wfile.flush()

    def _refuse(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        self._json(status, {"error": {"message": message}}, *headers)

    def _json(self, status: int, document: dict[str, Any], *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, format: str, *args: object) -> None:
        return


class Server(ThreadingHTTPServer):
    """models: what it lists. strict: refuses fields that OpenAI does not know. busy: refuses all.
    counts: says how many tokens there were. first_s: before the first text. reason: of the end.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Speaks)
        self.models = ["one", "two"]
        self.strict = self.busy = False
        self.counts = True
        self.first_s = 0.0
        self.reason = "stop"
        self.asked: list[dict[str, Any]] = []
        self.pause = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def speaking() -> Iterator[Server]:
    """One that listens; ended at the end."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.pause.set()
        server.shutdown()
        thread.join()
        server.server_close()
