"""In process on the CPU: ours against its peers, alternately, and latency under load.

    python -m benchmarks engine [--streams 1,8,32] [--runs 3] [--engines NAME ...] [--json FILE]

Every engine has a process, a clean interpreter and the same compute threads; all are loaded first,
then take turns, so that a slow minute of the machine hits neighbours alike. Ratios are of
neighbouring runs. Answers are greedy and never end early.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks import results
from benchmarks import settings
from benchmarks import workload
from benchmarks.peers import PEERS
from benchmarks.peers import Absent
from benchmarks.settings import say
from benchmarks.table import markdown
from benchmarks.worker import Worker
from service.cli import timing
from service.cli.timing import Answer

OURS = "moorage"
LONG_PROMPT = 4096
NEW_PROMPT = 256
WARM = workload.Lengths((32, 64), (8, 8))
# seeds of prompts; every run has its own, or a prefix cache would answer
WARM_SEED, LATENCY_SEED = 10_000_000, 20_000_000


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings.add(made, streams="1,8,16,32")
    made.add_argument("--engines", nargs="+", default=list(PEERS), choices=list(PEERS))
    made.add_argument("--openvino", type=Path, help="folder with fp16/ and int8/, converted")
    made.add_argument("--openvino-python", default=sys.executable, help="interpreter that has it")
    add_latency(made)
    return made


def add_latency(parser: argparse.ArgumentParser) -> None:
    """Options of the measurement under load."""
    parser.add_argument(
        "--latency", type=int, default=32, help="streams in the background; 0 leaves it out"
    )
    parser.add_argument(
        "--latency-answer", type=int, default=320, help="tokens of each of them; must outlast it"
    )
    parser.add_argument("--long-prompt", type=int, default=LONG_PROMPT, help="tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, save JSON. Returns the exit status: 1 if ours was not measured."""
    options = parser().parse_args(arguments)
    result = results.begin("engine", settings.plain(options))
    folder = settings.find_model(options.model)
    throughput(options, folder, result)
    if options.latency and OURS in options.engines:
        note_latency(lambda: latency(options, folder), result, options)
    sys.stdout.write(markdown(result))
    return 0 if any(row["engine"] == OURS for row in result["rows"]) else 1


def throughput(options: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """Rows of all engines at all numbers of streams, run by run."""
    lengths = settings.lengths(options)
    workers: dict[str, Worker] = {}
    try:
        for name in options.engines:
            start(name, options, folder, lengths.most, workers, result)
        for run in range(options.runs):
            for streams in options.streams:
                count = max(streams, options.least_requests)
                requests = workload.ids(count, lengths, seed=1000 * run + streams)
                for name in turned(list(workers), run):
                    measure(name, workers, requests, streams, run, result)
                    settings.save(options, result)
    finally:
        for worker in workers.values():
            worker.close()


def start(
    name: str,
    options: argparse.Namespace,
    folder: Path,
    context: int,
    workers: dict[str, Worker],
    result: dict[str, Any],
) -> None:
    """Load one engine and warm it up, or note why it cannot be measured."""
    python = sys.executable
    try:
        if name.startswith("openvino"):
            if options.openvino is None:
                raise Absent("no --openvino; see docs/benchmarks.md")
            folder, python = options.openvino, options.openvino_python
        worker = Worker(
            name,
            folder,
            context=context,
            streams=max(options.streams),
            python=python,
            threads=options.threads,
        )
        workers[name] = worker
        say(f"{name}: ready after {worker.ready_s:.1f} s, {worker.detail}")
        result["engines"][name] = {"ready_s": worker.ready_s, **worker.detail}
        for streams in options.streams:
            worker.answer(workload.ids(streams, WARM, WARM_SEED + streams), streams)
    except (Absent, RuntimeError) as error:
        leave_out(name, str(error), workers, result)


def turned(names: Sequence[str], run: int) -> list[str]:
    """The names in the order of this run: nobody is always after the same neighbour's rest."""
    first = run % len(names) if names else 0
    return [*names[first:], *names[:first]]


def measure(
    name: str,
    running: "dict[str, Any]",
    requests: Sequence[workload.Request],
    streams: int,
    run: int,
    result: dict[str, Any],
) -> None:
    """One row; an engine that fails is out."""
    try:
        answers = running[name].answer(requests, streams)
        found = figures.summary(answers)
        came, asked = found["tokens"], sum(request.tokens for request in requests)
        if came != asked:
            raise RuntimeError(f"{came} tokens came, {asked} were asked for")
    except RuntimeError as error:
        leave_out(name, f"failed at {streams} streams: {error}", running, result)
        return
    say(f"{name}, {streams} streams: {found['rate']:.1f} tok/s, first {found['first_ms']:.0f} ms")
    result["rows"].append({"engine": name, "streams": streams, "run": run, **found})


def leave_out(name: str, why: str, running: "dict[str, Any]", result: dict[str, Any]) -> None:
    """Note why an engine is not measured, and end it."""
    result["absent"][name] = why
    say(f"{name}: not measured: {why}")
    engine = running.pop(name, None)
    if engine is not None:
        engine.close()


def latency(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What newcomers wait for beside running streams, and what they cost those. Ours only."""
    long_prompt = options.long_prompt
    worker = Worker(
        OURS,
        folder,
        context=long_prompt + options.latency_answer + 64,
        streams=options.latency + 1,
        python=sys.executable,
        threads=options.threads,
    )
    try:
        return wait_times(options, worker, workload.ids)
    finally:
        worker.close()


def note_latency(
    measure: Callable[[], dict[str, Any]], result: dict[str, Any], options: argparse.Namespace
) -> None:
    """Put what is measured into the result, or why it could not be."""
    try:
        result["latency"] = measure()
        say(str(result["latency"]))
    except RuntimeError as error:
        result["absent"]["latency under load"] = str(error)
        say(str(error))
    settings.save(options, result)


def wait_times(
    options: argparse.Namespace,
    engine: Any,
    make: Callable[[int, workload.Lengths, int], list[workload.Request]],
) -> dict[str, Any]:
    """Ask a `Worker` or a `Server` of ours, with room for one stream more. Raises RuntimeError."""
    count, long_prompt = options.latency, options.long_prompt
    engine.answer(make(count, WARM, WARM_SEED), count)
    new = workload.Lengths((NEW_PROMPT, NEW_PROMPT), (8, 8))
    alone = engine.answer(make(3, new, LATENCY_SEED), 1)
    running = workload.Lengths((32, 64), (options.latency_answer,) * 2)
    long = workload.Lengths((long_prompt, long_prompt), (8, 8))
    front = [*make(3, new, LATENCY_SEED + 2), *make(1, long, LATENCY_SEED + 3)]
    behind, beside = engine.beside(make(count, running, LATENCY_SEED + 1), front)
    return {"streams": count, "long_prompt": long_prompt, **waits(alone, behind, beside)}


def waits(
    alone: Sequence[Answer], behind: Sequence[Answer], beside: Sequence[Answer]
) -> dict[str, float | None]:
    """Milliseconds from the answers of `latency`: the last of `beside` has the long prompt.

    idle: while only the background ran. Raises RuntimeError if a request failed, or the background
    ended before the long prompt's first token.
    """
    for answer in (*alone, *behind, *beside):
        if answer.error or not answer.times:
            raise RuntimeError(f"a request failed: {answer.error or 'no tokens'}")
    *news, long = beside
    first = beside[0].began
    last = min(answer.times[-1] for answer in behind)
    if last < long.times[0]:
        raise RuntimeError("the background ended first; give more --latency-answer")
    settled = max(answer.times[0] for answer in behind)
    idle = [
        *_gaps(behind, settled, first, whole=True),
        *_gaps(behind, long.times[-1], last, whole=True),
    ]
    during = _gaps(behind, long.began, long.times[0])
    alone_ms = statistics.median(answer.times[0] - answer.began for answer in alone) * 1e3
    loaded_ms = statistics.median(answer.times[0] - answer.began for answer in news) * 1e3
    step_ms = statistics.median(idle) * 1e3 if idle else None
    idle_p95 = timing.percentile(idle, 0.95) * 1e3 if idle else None
    during_p95 = timing.percentile(during, 0.95) * 1e3 if during else None
    return {
        "first_alone_ms": alone_ms,
        "first_loaded_ms": loaded_ms,
        "first_allowed_ms": None if step_ms is None else 2 * alone_ms + step_ms,
        "step_idle_ms": step_ms,
        "gap_idle_p95_ms": idle_p95,
        "gap_long_prompt_p95_ms": during_p95,
        "gap_ratio": None if idle_p95 is None or during_p95 is None else during_p95 / idle_p95,
        "long_prompt_first_ms": (long.times[0] - long.began) * 1e3,
    }


def _gaps(
    answers: Sequence[Answer], begin: float, end: float, *, whole: bool = False
) -> list[float]:
    """Gaps that touch this time, or lie in it as a whole."""
    pairs = [pair for answer in answers for pair in pairwise(answer.times)]
    if whole:
        return [b - a for a, b in pairs if begin <= a and b <= end]
    return [b - a for a, b in pairs if a < end and b > begin]
