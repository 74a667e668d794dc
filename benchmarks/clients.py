"""Streaming HTTP clients in a process of their own, so that the server has its own to itself.

    python -m benchmarks.clients < asked.json > answers.json

asked: {"url", "model", "dialect", "requests", "streams", "beside"}; see `benchmarks.worker` for
"beside".
"""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.loops import beside
from benchmarks.workload import Request
from service.cli.asking import Server
from service.cli.timing import Answer
from service.cli.timing import closed_loop


def body(dialect: str, model: str, request: Request) -> dict[str, Any]:
    """A greedy streaming completion of exactly `request.tokens` tokens, as each server wants it."""
    asked: dict[str, Any] = {
        "model": model,
        "prompt": request.text,
        "max_tokens": request.tokens,
        "temperature": 0,
    }
    if dialect == "transformers":
        # it refuses stream_options, and takes the end token only from here
        config = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": request.tokens}
        return asked | {"generation_config": json.dumps(config)}
    return asked | {"ignore_eos": True, "stream_options": {"include_usage": True}}


class Client:
    """Sends requests to one server; `one` may be called from any thread."""

    def __init__(self, url: str, model: str, dialect: str) -> None:
        self._server = Server(url)
        self._model, self._dialect = model, dialect

    def one(self, request: Request, answer: Answer) -> None:
        """Raises NoAnswer for a refusal or an error event, RuntimeError for too few tokens."""
        usage: Mapping[str, Any] = {}
        asked = body(self._dialect, self._model, request)
        for event in self._server.stream("/completions", asked):
            now = time.perf_counter()
            if any(choice.get("text") for choice in event.get("choices", ())):
                answer.times.append(now)
            usage = event.get("usage") or usage
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
