"""Who runs next. No torch, no threads, no clock: the engine calls it locked and passes the time.

Waiting sequences are admitted in order while fewer than `max_sequences` run. Running ones take
turns: one prefill chunk or one token each, so none waits longer than one step of every other, and a
long prompt stalls nobody.
"""

import math
from collections import deque
from dataclasses import dataclass

from service.engine.sequence import FinishReason
from service.engine.sequence import Sequence
from service.errors import DeadlineExceeded
from service.errors import Overloaded
from service.errors import ServiceError

LONGEST_RETRY_AFTER_S = 60


@dataclass(frozen=True)
class Work:
    """One step of one sequence: its tokens from `start` on that the model sees next.

    samples: a token is chosen from this step's logits; False for all but the last chunk of a
    prompt.
    """

    sequence: Sequence
    ids: tuple[int, ...]
    start: int
    samples: bool


class Scheduler:
    """Every sequence added comes out of `take_ended` exactly once, with its `outcome` set."""

    def __init__(self, *, max_sequences: int, max_queue: int, chunk_tokens: int) -> None:
        """max_sequences: run at once. max_queue: wait beyond. chunk_tokens: of a prompt a step."""
        for name, value, least in (
            ("max_sequences", max_sequences, 1),
            ("max_queue", max_queue, 0),
            ("chunk_tokens", chunk_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; give {least} or more")
        self._max_sequences = max_sequences
        self._max_queue = max_queue
        self._chunk_tokens = chunk_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: deque[Sequence] = deque()  # the leftmost is next
        self._ended: deque[Sequence] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def has_sequences(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def has_work(self) -> bool:
        """Whether the engine thread has anything to do, cleaning up included."""
        return bool(self._waiting or self._running or self._ended)

    def add(self, sequence: Sequence, *, step_s: float) -> None:
        """Queue a sequence. Raises Overloaded when `max_queue` wait already.

        step_s: how long a step takes at present, for the estimate of when to try again.
        """
        if self.waiting + self.running >= self._max_sequences + self._max_queue:
            raise Overloaded(
                f"{self.running} sequences are running and {self.waiting} are waiting, "
                "which is all this server takes.",
                hint="Try again after the time in Retry-After.",
                retry_after_s=self._retry_after_s(step_s),
            )
        self._waiting.append(sequence)

    def next_work(self, now: float) -> Work | None:
        """Drop what is cancelled or late, admit, and return the next step; None if nobody is left.

        now: seconds on the clock of the deadlines. What was dropped is in `take_ended`.
        """
        self._drop(now)
        while self._waiting and self.running < self._max_sequences:
            self._running.append(self._waiting.popleft())
        if not self._running:
            return None
        sequence = self._running[0]
        self._running.rotate(-1)
        start = sequence.computed
        stop = min(sequence.known, start + self._chunk_tokens)
        return Work(sequence, sequence.ids(start, stop), start, samples=stop == sequence.known)

    def record(self, work: Work, token: int | None) -> bool:
        """Note that `work` was done, with its token if it samples. Says whether to deliver it."""
        sequence = work.sequence
        if sequence.outcome is not None:  # ended by another thread during the step
            return False
        sequence.computed = work.start + len(work.ids)
        if token is None:
            return False
        if token in sequence.params.stop_ids:
            self.end(sequence, "stop")
            return False
        sequence.generated.append(token)
        if len(sequence.generated) >= sequence.params.max_tokens:
            self.end(sequence, "length")
        return True

    def end(self, sequence: Sequence, outcome: FinishReason | ServiceError) -> None:
        """End one sequence, wherever it is. Does nothing if it has ended."""
        if sequence.outcome is not None:
            return
        sequence.outcome = outcome
        queue = self._running if sequence in self._running else self._waiting
        queue.remove(sequence)
        self._ended.append(sequence)

    def end_all(self, error: ServiceError) -> tuple[Sequence, ...]:
        """End every sequence with `error`; return all that have ended and are still to be taken."""
        for sequence in (*self._running, *self._waiting):
            self.end(sequence, error)
        return tuple(self._ended)

    def take_ended(self) -> Sequence | None:
        """One sequence that has ended, to free its memory and tell its client, or None.

        One at a time, so that a caller that fails on one has not taken the others.
        """
        return self._ended.popleft() if self._ended else None

    def _drop(self, now: float) -> None:
        for sequence in (*self._running, *self._waiting):
            if sequence.stream.cancelled:
                self.end(sequence, "cancelled")
            elif sequence.deadline is not None and now >= sequence.deadline:
                self.end(sequence, DeadlineExceeded("The request took longer than it was given."))

    def _retry_after_s(self, step_s: float) -> int:
        """Whole seconds until a running sequence is through, if each says all that it may."""
        steps = min((self._steps_left(sequence) for sequence in self._running), default=1)
        seconds = math.ceil(steps * max(1, self.running) * step_s)
        return min(max(1, seconds), LONGEST_RETRY_AFTER_S)

    def _steps_left(self, sequence: Sequence) -> int:
        prompt = max(0, len(sequence.prompt) - sequence.computed)
        return (
            math.ceil(prompt / self._chunk_tokens)
            + sequence.params.max_tokens
            - len(sequence.generated)
        )
