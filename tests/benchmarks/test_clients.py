import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer

import pytest

from benchmarks.clients import Client
from benchmarks.workload import Request
from service.cli.timing import Answer
from service.errors import NoAnswer


class Speaks(BaseHTTPRequestHandler):
    """Answers with as many pieces as asked for, less what the prompt says is to be missing."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["prompt"] == "refuse":
            self.send_error(429)
            return
        self.send_response(200)
        self.end_headers()
        if asked["prompt"] == "break":
            self.event({"error": {"message": "it broke"}})
            return
        for _ in range(asked["max_tokens"]):
            self.event({"choices": [{"text": "a"}]})
        self.event({"choices": [{"text": "", "finish_reason": "length"}]})
        came = asked["max_tokens"] - (asked["prompt"] == "short")
        self.event({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": came}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, document: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def client() -> Iterator[Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Speaks)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Client(f"http://127.0.0.1:{server.server_port}", "m", "openai")
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_stream_is_timed_by_pieces_of_text_and_counted_by_its_usage(client: Client):
    answer = Answer(0.0)
    client.one(Request(5, text="hello"), answer)
    assert (len(answer.times), answer.tokens, answer.prompt_tokens) == (5, 5, 2)
    assert answer.times == sorted(answer.times)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("refuse", "status 429"), ("break", "it broke"), ("short", "4 tokens came, 5 were asked for")],
)
def test_what_goes_wrong_is_raised(client: Client, prompt: str, told: str):
    with pytest.raises((NoAnswer, RuntimeError), match=told):
        client.one(Request(5, text=prompt), Answer(0.0))
