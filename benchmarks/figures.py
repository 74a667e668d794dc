"""From when tokens arrived to figures, and from runs to medians, spreads and ratios.

Only the standard library: peers are measured by interpreters that have nothing else of ours.
"""

import statistics
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from service.cli import timing
from service.cli.timing import Answer


def step_s(answers: Sequence[Answer]) -> float | None:
    """Seconds of one step while every answer was being decoded and no prompt computed.

    None if there was no such time: fewer than 5 arrivals of an answer in it.
    """
    started = [answer for answer in answers if len(answer.times) > 1]
    if not started or len(started) < len(answers):
        return None
    begin = max(answer.times[0] for answer in started)
    end = min(answer.times[-1] for answer in started)
    found = []
    for answer in started:
        inside = [at for at in answer.times if begin <= at <= end]
        if len(inside) < 5:
            return None
        found.append((inside[-1] - inside[0]) / (len(inside) - 1))
    return statistics.median(found)


def summary(answers: Sequence[Answer]) -> dict[str, float | int | None]:
    """Figures of one run: tokens a second over everything, and milliseconds.

    Raises RuntimeError if a request failed, with what it said.
    """
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    silent = sum(not answer.times for answer in answers)
    if silent or not answers:
        raise RuntimeError(f"{silent} of {len(answers)} answers were empty")
    step = step_s(answers)
    return {**timing.figures(answers), "step_ms": None if step is None else step * 1e3}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest. Raises ValueError without values."""
    if not values:
        raise ValueError("the spread of nothing")
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """`spread` of own / other, run by run: neighbours in time, so that a slow hour cancels out."""
    return spread([a / b for a, b in zip(own, other, strict=False)])


def runs_of(rows: Sequence[Mapping[str, Any]], engine: str, streams: int, key: str) -> list[float]:
    """One figure of one engine at one number of streams, by run; rows as in a result."""
    found = [r for r in rows if r["engine"] == engine and r["streams"] == streams]
    return [row[key] for row in sorted(found, key=lambda r: r["run"]) if row.get(key) is not None]
