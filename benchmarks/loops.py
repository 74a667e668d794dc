"""Clients on threads: some beside others that are running; so many at a time is `closed_loop`.

`one` sends one request: see `service.cli.timing.send`.
"""

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence

from benchmarks.workload import Request
from service.cli.timing import Answer
from service.cli.timing import send

One = Callable[[Request, Answer], None]

# tokens that every background stream has delivered before anything is measured beside it
SETTLED = 8


def beside(
    background: Sequence[Request], foreground: Sequence[Request], one: One, *, wait_s: float = 600
) -> tuple[list[Answer], list[Answer]]:
    """Answers of `background`, all at once, and of `foreground`, one by one once those run.

    The caller sees from the times whether the background lasted. Raises RuntimeError if it did not
    settle within `wait_s` or failed.
    """
    behind = [Answer(0.0) for _ in background]
    threads = [
        threading.Thread(target=send, args=(request, answer, one), daemon=True)
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
        send(request, answer, one)
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    return behind, front
