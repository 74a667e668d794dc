"""Over HTTP on the CPU: does a stream that must follow a schema slow those beside it?

    python -m benchmarks constrained [--streams 8] [--runs 5] [--model smollm2-135m] [--json FILE]

In every run the same chats are streamed twice: all free, and with the last one bound to a JSON
schema that it cannot fulfil within its tokens. What counts is the step of the others while all of
them decode; the ratio is of the two halves of a run, which take turns in going first.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks import figures
from benchmarks import results
from benchmarks import settings
from benchmarks import workload
from benchmarks.servers import Asked
from benchmarks.servers import Server
from benchmarks.servers import free_port
from benchmarks.settings import say
from service.cli import asking
from service.cli.timing import Answer
from service.cli.timing import closed_loop

CONTEXT = 1024
LENGTHS = workload.Lengths((64, 128), (160, 160))
STAFF = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,20}( [A-Z][a-z]{2,20})+$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "role": {"enum": ["captain", "mate", "engineer", "cook"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1},
        },
        "required": ["name", "age", "role", "tags"],
        "additionalProperties": False,
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the ratio, save JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks constrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    settings.add_where(parser)
    options = parser.parse_args(arguments)
    result = results.begin("constrained", settings.plain(options))
    folder = settings.find_model(options.model)
    asked = Asked(folder, CONTEXT, options.streams, options.threads, free_port(), {})
    server = Server("moorage", asked)
    try:
        half(server, folder.name, options.streams, -1, bound=True)  # warm; compiles the schema
        for run in range(options.runs):
            steps = {}
            for bound in (run % 2 == 0, run % 2 == 1):
                steps[bound] = half(server, folder.name, options.streams, run, bound=bound)
            row = {"run": run, "free_ms": steps[False] * 1e3, "beside_ms": steps[True] * 1e3}
            say(f"run {run}: free {row['free_ms']:.2f} ms, beside {row['beside_ms']:.2f} ms")
            result["rows"].append(row)
            settings.save(options, result)
    finally:
        server.close()
    found = [row["beside_ms"] / row["free_ms"] for row in result["rows"]]
    result["ratio"] = figures.spread(found)
    settings.save(options, result)
    sys.stdout.write(
        f"{options.streams - 1} streams beside one that follows a schema: a step takes "
        f"{statistics.median(found):.3f} of what it takes beside a free one "
        f"({min(found):.3f}-{max(found):.3f}, {len(found)} runs)\n"
    )
    return 0


def half(server: Server, model: str, streams: int, run: int, *, bound: bool) -> float:
    """Stream the chats of a run at once. Returns seconds of a step of all but the last.

    Raises RuntimeError if one failed, or there was no time in which all of them decoded.
    """
    chats = [
        {"model": model, "messages": [{"role": "user", "content": r.text}], "max_tokens": r.tokens}
        | {"temperature": 0, "ignore_eos": True}
        for r in workload.texts(streams, LENGTHS, run)
    ]
    if bound:
        form = {"name": "staff", "strict": True, "schema": STAFF}
        chats[-1]["response_format"] = {"type": "json_schema", "json_schema": form}
        del chats[-1]["ignore_eos"]
    answers = closed_loop(chats, streams, partial(stream, asking.Server(server.url)))
    if failed := [answer.error for answer in answers if answer.error]:
        raise RuntimeError(f"{len(failed)} of {streams} chats failed: {failed[0]}")
    seconds = figures.step_s(shared(answers))
    if seconds is None:
        raise RuntimeError("there was no time in which all streams decoded")
    return seconds


def shared(answers: Sequence[Answer]) -> list[Answer]:
    """All but the last, of the time in which the last one was decoding, too."""
    begin, end = answers[-1].times[0], answers[-1].times[-1]
    return [
        Answer(answer.began, [at for at in answer.times if begin <= at <= end])
        for answer in answers[:-1]
    ]


def stream(server: asking.Server, chat: dict[str, Any], answer: Answer) -> None:
    """One chat. Raises NoAnswer."""
    for event in server.stream("/chat/completions", chat):
        if any(choice["delta"].get("content") for choice in event["choices"]):
            answer.times.append(time.perf_counter())
