"""Streaming HTTP clients in a process of their own, so that the server has its own to itself.

    python -m benchmarks.clients < asked.json > answers.json

asked: {"url", "model", "dialect", "requests", "streams", "beside"}; see `benchmarks.worker` for
"beside". Only the standard library: what is measured is the server.
"""

import http.client
import json
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from benchmarks.figures import Answer
from benchmarks.loops import beside
from benchmarks.loops import closed_loop
from benchmarks.workload import Request

SILENCE_S = 900.0


def body(dialect: str, model: str, request: Request) -> dict[str, Any]:
    """A greedy streaming completion of exactly `request.tokens` tokens, as each server wants it."""
    asked: dict[str, Any] = {
        "model": model,
        "prompt": request.text,
        "max_tokens": request.tokens,
        "temperature": 0,
        "stream": True,
    }
    if dialect == "transformers":
        # it refuses stream_options, and takes the end token only from here
        config = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": request.tokens}
        return asked | {"generation_config": json.dumps(config)}
    return asked | {"ignore_eos": True, "stream_options": {"include_usage": True}}


def events(response: http.client.HTTPResponse) -> Any:
    """Yield the JSON documents of an SSE response as they come."""
    while line := response.readline():
        if line.startswith(b"data: ") and b"[DONE]" not in line:
            yield json.loads(line[6:])


class Client:
    """Sends requests to one server; `one` may be called from any thread."""

    def __init__(self, url: str, model: str, dialect: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._model, self._dialect = model, dialect

    def one(self, request: Request, answer: Answer) -> None:
        """Raises RuntimeError for another status than 200, an error event, or too few tokens."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=SILENCE_S)
        text = json.dumps(body(self._dialect, self._model, request))
        usage: Mapping[str, Any] = {}
        try:
            connection.request(
                "POST", "/v1/completions", text, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
            for event in events(response):
                now = time.perf_counter()
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if any(choice.get("text") for choice in event.get("choices", ())):
                    answer.times.append(now)
                usage = event.get("usage") or usage
        finally:
            connection.close()
        answer.tokens = usage.get("completion_tokens", 0)
        answer.prompt_tokens = usage.get("prompt_tokens", 0)
        if answer.tokens != request.tokens:
            raise RuntimeError(f"{answer.tokens} tokens came, {request.tokens} were asked for")


def main() -> int:
    """Ask what stdin says, print the answers. Returns the exit status."""
    asked = json.load(sys.stdin)
    one = Client(asked["url"], asked["model"], asked["dialect"]).one
    requests = [Request.of(document) for document in asked["requests"]]
    front = [Request.of(document) for document in asked["beside"]]
    if front:
        answers, found = beside(requests, front, one)
    else:
        answers, found = closed_loop(requests, asked["streams"], one), []
    plain = {"answers": [a.as_dict() for a in answers], "beside": [a.as_dict() for a in found]}
    json.dump(plain, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
