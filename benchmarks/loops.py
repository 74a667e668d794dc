"""Clients on threads: so many at a time, or some beside others that are running.

Only the standard library. `one` sends one request and fills the answer it is given: `times` while
tokens come, the rest at the end. Whatever it raises is that answer's error.
"""

import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence

from benchmarks.figures import Answer
from benchmarks.workload import Request

One = Callable[[Request, Answer], None]

# tokens that every background stream has delivered before anything is measured beside it
SETTLED = 8


def closed_loop(requests: Sequence[Request], streams: int, one: One) -> list[Answer]:
    """All requests, `streams` at a time, the next when one is done; answers in their order."""
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
            _send(request, answer, one)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def beside(
    background: Sequence[Request], foreground: Sequence[Request], one: One, *, wait_s: float = 600
) -> tuple[list[Answer], list[Answer]]:
    """Answers of `background`, all at once, and of `foreground`, one by one once those run.

    The caller sees from the times whether the background lasted. Raises RuntimeError if it did not
    settle within `wait_s` or failed.
    """
    behind = [Answer(0.0) for _ in background]
    threads = [
        threading.Thread(target=_send, args=(request, answer, one), daemon=True)
        for request, answer in zip(background, behind, strict=True)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + wait_s
    while any(len(answer.times) < SETTLED for answer in behind):
        failed = [answer.error for answer in behind if answer.error]
        if failed or time.monotonic() > end:
            raise RuntimeError(f"the background does not run: {failed[:1] or 'no tokens come'}")
        time.sleep(0.05)
    front = [Answer(0.0) for _ in foreground]
    for request, answer in zip(foreground, front, strict=True):
        _send(request, answer, one)
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    return behind, front


def _send(request: Request, answer: Answer, one: One) -> None:
    answer.began = time.perf_counter()
    try:
        one(request, answer)
    except Exception as error:  # an engine may raise anything; the figures must show it
        answer.error = f"{type(error).__name__}: {error}"
