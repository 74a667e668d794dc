"""A server under mixed and faulty clients for a long time: every request ends, nothing leaks.

    python -m benchmarks soak [--minutes 15] [--model smollm2-135m] [--clients 8] [--json FILE]

A tenth of the time, a minute at most, is warm-up: threads are started, allocators find their size.
At the end, when all clients have gone, sequences and KV tokens in use must be 0, and threads and
files no more than in the first half: a pool of threads grows by one when more requests than ever
come together, which is rarer with each that it has; a leak goes on. Memory (RSS) is judged by its
median over the last fifth of the time against that over the first fifth after the warm-up: it may
be 5 % and 16 MiB more. A leak grows with time and so moves the median; what one large request
takes does not.
"""

import argparse
import collections
import random
import re
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks import servers
from benchmarks import settings
from benchmarks.soak_clients import KINDS
from benchmarks.soak_clients import Improper
from benchmarks.soak_clients import Target

SAMPLE_S = 2.0
SETTLE_S = 60.0
FACTOR, SLACK_MIB = 1.05, 16.0
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_tokens_used")


class Tally:
    """How requests ended, by kind. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ends: dict[str, collections.Counter[str]] = {}
        self.improper: list[str] = []

    def note(self, kind: str, end: str) -> None:
        with self._lock:
            self.ends.setdefault(kind, collections.Counter())[end] += 1

    def complain(self, kind: str, what: str) -> None:
        with self._lock:
            self.improper.append(f"{kind}: {what}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print, save JSON. Returns 0 if all requests ended properly and nothing leaked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--model", default="smollm2-135m", help="as in moorage.yaml")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=results.FOLDER / "soak.json")
    options = parser.parse_args(arguments)
    result = results.begin("soak", settings.plain(options))
    folder = settings.find_model(options.model)
    asked = servers.Asked(folder, 512, 4, threads=1, port=servers.free_port(), tools={})
    server = servers.Server("moorage", asked)
    try:
        tally = Tally()
        samples = run(server, folder.name, tally, options)
    finally:
        server.close()
    result["rows"] = samples
    result["ends"] = {kind: dict(ends) for kind, ends in sorted(tally.ends.items())}
    result["figures"] = figures(samples)
    result["faults"] = [*tally.improper, *leaks(samples)]
    results.save(options.json, result)
    sys.stdout.write(table(result))
    return 1 if result["faults"] else 0


def run(
    server: servers.Server, model: str, tally: Tally, options: argparse.Namespace
) -> list[dict[str, float]]:
    """Samples from the start to the last one, taken when all clients have gone."""
    target = Target(server.url, model)
    began, seconds = time.monotonic(), options.minutes * 60
    over = threading.Event()

    def client(number: int) -> None:
        chance = random.Random(options.seed * 1000 + number)
        while not over.is_set():
            kind = chance.choice(list(KINDS))
            try:
                tally.note(kind, KINDS[kind](target, chance))
            except Improper as error:
                tally.complain(kind, str(error))
            except OSError as error:
                tally.complain(kind, f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=client, args=(n,)) for n in range(options.clients)]
    samples = [sample(server, began)]
    for thread in threads:
        thread.start()
    try:
        while time.monotonic() - began < seconds:
            time.sleep(SAMPLE_S)
            samples.append(sample(server, began))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    end = time.monotonic() + SETTLE_S
    while True:
        last = sample(server, began)
        if not any(last[name] for name in GAUGES) or time.monotonic() > end:
            break
        time.sleep(0.5)
    time.sleep(SAMPLE_S)  # connections that linger, threads of timers
    samples.append(sample(server, began))
    return samples


def sample(server: servers.Server, began: float) -> dict[str, float]:
    """What the worker holds now."""
    worker = server.worker()
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:  # noqa: S310
        text = response.read().decode()
    found = {name: re.search(rf"^moorage:{name}(?:{{.*}})? (\S+)$", text, re.M) for name in GAUGES}
    return {
        "s": round(time.monotonic() - began, 1),
        "pid": worker.pid,
        "rss_mib": round(worker.memory_info().rss / 2**20, 1),
        "threads": worker.num_threads(),
        "files": worker.num_fds(),
        **{name: float(match[1]) if match else 0.0 for name, match in found.items()},
    }


def warm_up_s(seconds: float) -> float:
    """How much of so many seconds does not count."""
    return min(60.0, seconds / 10)


def figures(samples: Sequence[Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The samples after the warm-up (a minute), in the middle, and at the end."""
    seconds = samples[-1]["s"]

    def at(moment: float) -> Mapping[str, float]:
        return min(samples, key=lambda one: abs(one["s"] - moment))

    return {"warm": at(warm_up_s(seconds)), "middle": at(seconds / 2), "end": samples[-1]}


def leaks(samples: Sequence[Mapping[str, float]]) -> list[str]:
    """What is more than it may be, in words."""
    seconds = samples[-1]["s"]
    warm = [one for one in samples[:-1] if one["s"] >= warm_up_s(seconds)]
    last = samples[-1]
    found = [f"{name} is {last[name]:g} at the end" for name in GAUGES if last[name]]
    if len({one["pid"] for one in samples}) > 1:
        found.append("the worker was replaced")
    for name in ("threads", "files"):
        before = max(one[name] for one in warm[: max(1, len(warm) // 2)])
        if last[name] > before:
            found.append(f"{name} were {before:g} in the first half and are {last[name]:g}")
    fifth = max(1, len(warm) // 5)
    before, after = (
        statistics.median(one["rss_mib"] for one in part) for part in (warm[:fifth], warm[-fifth:])
    )
    if after > before * FACTOR + SLACK_MIB:
        found.append(f"memory was {before:.0f} MiB after the warm-up and grew to {after:.0f} MiB")
    return found


def table(result: Mapping[str, Any]) -> str:
    """The figures, the ends of requests, and what was wrong."""
    names = ["s", "rss_mib", "threads", "files", *GAUGES]
    lines = ["  ".join(["moment", *names])]
    for moment, one in result["figures"].items():
        lines.append("  ".join([moment, *(f"{one[name]:g}" for name in names)]))
    for kind, ends in result["ends"].items():
        told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
        lines.append(f"{kind}: {told}")
    total = sum(sum(ends.values()) for ends in result["ends"].values())
    lines.append(f"{total} requests ended properly")
    lines += [f"FAULT {fault}" for fault in result["faults"][:20]]
    return "\n".join([*lines, ""])
