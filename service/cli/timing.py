"""Many requests at once, and from when their tokens arrived to figures.

Only the standard library: `python -m benchmarks` measures peers with this in interpreters that have
nothing else of ours.
"""

import queue
import statistics
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from itertools import pairwise
from typing import Any
from typing import TypeVar

Request = TypeVar("Request")


@dataclass
class Answer:
    """What came of one request. began and times: seconds on one clock, of whoever measured.

    times: one entry for each arrival, so several tokens may share one. tokens: of the answer.
    """

    began: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Answer":
        """Back from JSON."""
        return cls(**document)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring arrivals."""
        return [b - a for a, b in pairwise(self.times)]


def _nothing(answer: Answer) -> None:
    """For callers that wait for all."""


def closed_loop(
    requests: Sequence[Request],
    clients: int,
    one: Callable[[Request, Answer], None],
    done: Callable[[Answer], None] = _nothing,
) -> list[Answer]:
    """All requests, `clients` at a time, the next when one is done; answers in their order.

    one: see `send`. done: told each answer as soon as it has ended, on its client's thread.
    """
    waiting: queue.SimpleQueue[tuple[Request, Answer]] = queue.SimpleQueue()
    answers = [Answer(0.0) for _ in requests]
    for pair in zip(requests, answers, strict=True):
        waiting.put(pair)

    def client() -> None:
        while True:
            try:
                request, answer = waiting.get_nowait()
            except queue.Empty:
                return
            send(request, answer, one)
            done(answer)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def send(request: Request, answer: Answer, one: Callable[[Request, Answer], None]) -> None:
    """Send one request. `one` fills the answer it is given: `times` while tokens come, the rest at
    the end. Whatever it raises is that answer's error.
    """
    answer.began = time.perf_counter()
    try:
        one(request, answer)
    except Exception as error:  # an engine may raise anything; the figures must show it
        answer.error = f"{type(error).__name__}: {error}"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share (0..1) of the values do not exceed.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def figures(answers: Sequence[Answer]) -> dict[str, float | int | None]:
    """Of answers with at least one arrival each: rates a second from the first request to the last
    token, and milliseconds. gap_*: None if no answer had two arrivals. Raises ValueError without
    answers.
    """
    seconds = max(a.times[-1] for a in answers) - min(a.began for a in answers)
    tokens = sum(answer.tokens for answer in answers)
    firsts = [(answer.times[0] - answer.began) * 1e3 for answer in answers]
    gaps = [gap * 1e3 for answer in answers for gap in answer.gaps]
    return {
        "rate": tokens / seconds,
        "requests_rate": len(answers) / seconds,
        "first_ms": statistics.median(firsts),
        "first_p95_ms": percentile(firsts, 0.95),
        "gap_ms": statistics.median(gaps) if gaps else None,
        "gap_p95_ms": percentile(gaps, 0.95) if gaps else None,
        "tokens": tokens,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "seconds": seconds,
    }
