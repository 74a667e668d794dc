"""Who runs next. No torch, no threads, no clock: the engine calls it locked and passes the time.

Every step mixes the next token of each running sequence with pieces of the prompts that are not
computed yet, under a budget of tokens, so that a long prompt stalls nobody. A sequence that finds
no memory for its next token makes the newest one give way: that one waits first in line and is
computed again.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from service.engine.sequence import FinishReason
from service.engine.sequence import Sequence
from service.errors import DeadlineExceeded
from service.errors import InvalidRequest
from service.errors import Overloaded
from service.errors import ServiceError

LONGEST_RETRY_AFTER_S = 60


class Memory(Protocol):
    """Where keys and values go: `Pages` or `Slots`. Only what a scheduler needs of them."""

    prefix_tokens: int

    @property
    def used_tokens(self) -> int: ...
    def admit(self, sequence: Sequence) -> bool: ...
    def grow(self, sequence: Sequence, tokens: int) -> bool: ...
    def computed(self, sequence: Sequence) -> None: ...
    def free(self, sequence: Sequence, *, failed: bool = False) -> None: ...


@dataclass(frozen=True)
class Piece:
    """What one step computes of one sequence: its tokens from `start` on.

    samples: a token is chosen from the last one's logits; False for all but the last piece of a
    prompt. ids is empty in a step that begins before the token is known (see `Batch.follows`).
    """

    sequence: Sequence
    ids: tuple[int, ...]
    start: int
    samples: bool

    @property
    def stop(self) -> int:
        """Tokens of the sequence that are computed after this piece."""
        return self.start + max(1, len(self.ids))


@dataclass(frozen=True)
class Batch:
    """One step. decodes: one token each. prefills: pieces of prompts, in order of admission.

    follows: each decode's token is the one that the step before chooses for it, in the same order,
    and is not known on this side yet.
    """

    decodes: tuple[Piece, ...] = ()
    prefills: tuple[Piece, ...] = ()
    follows: bool = False

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """In the order of the step's tokens: decodes, then prefills."""
        return (*self.decodes, *self.prefills)

    @property
    def tokens(self) -> int:
        return len(self.decodes) + sum(len(piece.ids) for piece in self.prefills)


class Scheduler:
    """Every sequence added comes out of `take_ended` exactly once, with its `outcome` set."""

    def __init__(
        self,
        memory: Memory,
        *,
        max_sequences: int,
        max_queue: int,
        step_tokens: int,
        score_tokens: int = 0,
    ) -> None:
        """max_sequences: run at once. max_queue: wait beyond. step_tokens: most in one step.

        score_tokens: most in one step of prompts whose logprobs are wanted, since the logits of
        all of them are kept; 0: none can be had.
        """
        for name, value, least in (
            ("max_sequences", max_sequences, 1),
            ("max_queue", max_queue, 0),
            ("step_tokens", step_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; give {least} or more")
        self.memory = memory
        self._max_sequences = max_sequences
        self._max_queue = max_queue
        self._step_tokens = step_tokens
        self._score_tokens = score_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission, the newest last
        self._ended: deque[Sequence] = deque()
        self.preemptions = 0

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

    def allow_queue(self, max_queue: int) -> None:
        """So many sequences may wait from now on; those that wait already stay."""
        self._max_queue = max_queue

    def add(self, sequences: tuple[Sequence, ...], *, step_s: float) -> None:
        """Queue the sequences of one request, all or none.

        step_s: how long a step takes at present, for the estimate of when to try again. Raises
        Overloaded when they find no place among those that may wait, InvalidRequest when there
        are more than could ever, or when they want logprobs of prompts that have none.
        """
        room = self._max_sequences + self._max_queue
        if len(sequences) > room:
            raise InvalidRequest(
                f"{len(sequences)} answers were asked for; this server takes {room} at once.",
                param="n",
            )
        wants_scores = any(s.params.prompt_logprobs is not None for s in sequences)
        if wants_scores and not self._score_tokens:
            raise InvalidRequest(
                "This model has no logprobs of a prompt: an encoder reads it as a whole.",
                param="echo",
            )
        if self.waiting + self.running + len(sequences) > room:
            raise Overloaded(
                f"{self.running} sequences are running and {self.waiting} are waiting, "
                "which is all this server takes.",
                hint="Try again after the time in Retry-After.",
                retry_after_s=self._retry_after_s(step_s),
            )
        self._waiting.extend(sequences)

    def next_batch(self, now: float, prefill_tokens: int) -> Batch | None:
        """Drop what is cancelled or late, admit, and return the next step; None if nobody is left.

        now: seconds on the clock of the deadlines. prefill_tokens: most tokens of prompts in a
        step that also continues running sequences. What was dropped is in `take_ended`.
        """
        self._drop(now)
        decodes = self._decodes()
        budget = self._step_tokens - len(decodes)
        if decodes:
            # the more wait for their first token, the longer the others may wait for their next
            behind = min(self.waiting + self.running, self._max_sequences) - len(decodes)
            budget = min(budget, prefill_tokens * (len(decodes) + behind - 1) // len(decodes))
        prefills: list[Piece] = []
        scores = self._score_tokens
        candidates = self._prefilling(now)
        while budget > 0 and (sequence := next(candidates, None)) is not None:
            stop = min(sequence.known, sequence.computed + budget)
            if sequence.params.prompt_logprobs is not None:
                stop = min(stop, sequence.computed + scores)
                scores -= stop - sequence.computed
                if stop == sequence.computed:
                    continue
            ids = sequence.ids(sequence.computed, stop)
            prefills.append(Piece(sequence, ids, sequence.computed, stop == sequence.known))
            budget -= len(ids)
        if not decodes and not prefills:
            return None
        return Batch(tuple(decodes), tuple(prefills))

    def batch_after(self, batch: Batch, now: float) -> Batch | None:
        """The step after `batch`, whose tokens are not known yet; None if it must be waited for.

        Only when it is sure to be the same sequences with one token more: nobody waits to be
        admitted, nobody's prompt is being computed, nobody has been dropped or reaches its last
        token, and there is memory. `batch` is the only step not recorded.
        """
        if batch.prefills or self._waiting or self._ended or len(batch.decodes) != self.running:
            return None
        for piece in batch.decodes:
            sequence = piece.sequence
            if sequence.tokens_left < 2 or self._dropped(sequence, now):
                return None
        follow = tuple(Piece(p.sequence, (), p.stop, True) for p in batch.decodes)
        if not all(self.memory.grow(piece.sequence, piece.stop) for piece in follow):
            return None
        return Batch(follow, follows=True)

    def record(self, piece: Piece, token: int | None) -> bool:
        """Note that `piece` was computed, with its token if it samples. Says whether to deliver
        the token.
        """
        sequence = piece.sequence
        if sequence.outcome is not None:  # ended by another thread, or by the step before
            return False
        sequence.computed = piece.stop
        self.memory.computed(sequence)
        if piece.samples and not sequence.params.max_tokens:
            self.end(sequence, "length")
            return False
        if token is None:
            return False
        if token in sequence.params.stop_ids:
            self.end(sequence, "stop")
            return False
        sequence.generated.append(token)
        if sequence.tokens_left <= 0:
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
        """One sequence that has ended, its memory freed, to tell its client, or None.

        One at a time, so that a failure in between leaves it and the others to `end_all`. A step
        that is under way may still write to that memory, but before any later one does.
        """
        if not self._ended:
            return None
        sequence = self._ended[0]
        self.memory.free(sequence, failed=isinstance(sequence.outcome, ServiceError))
        self._ended.popleft()
        return sequence

    def _decodes(self) -> list[Piece]:
        """One token of every running sequence whose prompt is computed, oldest first."""
        pieces: list[Piece] = []
        for sequence in tuple(self._running):
            if not _decodes_next(sequence):
                continue
            while sequence.hold is not None and not self.memory.grow(sequence, sequence.known):
                self._preempt(self._running[-1])
            if sequence.hold is not None:
                ids = sequence.ids(sequence.computed, sequence.known)
                pieces.append(Piece(sequence, ids, sequence.computed, samples=True))
        return [piece for piece in pieces if piece.sequence.hold is not None]

    def _preempt(self, sequence: Sequence) -> None:
        """Take the memory of a running sequence; it waits, first in line, to be computed again."""
        self.memory.free(sequence)
        sequence.computed = 0
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _prefilling(self, now: float) -> Iterator[Sequence]:
        """Running sequences whose tokens are not computed, then newly admitted ones, lazily: none
        is admitted before the budget has room for it.
        """
        for sequence in tuple(self._running):
            if not _decodes_next(sequence):
                yield sequence
        while self.running < self._max_sequences:
            found = self._next_waiting()
            if found is None or not self.memory.admit(found):
                return
            self._waiting.remove(found)
            self._running.append(found)
            if not found.generated:
                found.stream.cached_tokens = found.computed
            if found.stream.admitted_at is None:
                found.stream.admitted_at = now
            yield found

    def _next_waiting(self) -> Sequence | None:
        """The first in line of the owner with the fewest running sequences.

        One that was preempted goes before all; one that shares a prompt goes after it is computed.
        """
        if self._waiting and self._waiting[0].generated:
            return self._waiting[0]
        running: dict[str, int] = {}
        for sequence in self._running:
            running[sequence.owner] = running.get(sequence.owner, 0) + 1
        ready = (sequence for sequence in self._waiting if _may_start(sequence))
        return min(ready, key=lambda sequence: running.get(sequence.owner, 0), default=None)

    def _drop(self, now: float) -> None:
        for sequence in (*self._running, *self._waiting):
            outcome = self._dropped(sequence, now)
            if outcome is not None:
                self.end(sequence, outcome)

    def _dropped(self, sequence: Sequence, now: float) -> FinishReason | ServiceError | None:
        if sequence.stream.cancelled:
            return "cancelled"
        if sequence.deadline is not None and now >= sequence.deadline:
            return DeadlineExceeded("The request took longer than it was given.")
        return sequence.stream.overflow

    def _retry_after_s(self, step_s: float) -> int:
        """Whole seconds until a running sequence is through, if each says all that it may."""
        steps = min((self._steps_left(sequence) for sequence in self._running), default=1)
        return min(max(1, math.ceil(steps * step_s)), LONGEST_RETRY_AFTER_S)

    def _steps_left(self, sequence: Sequence) -> int:
        prompt = max(0, len(sequence.prompt) - sequence.computed)
        return math.ceil(prompt / self._step_tokens) + sequence.tokens_left


def _decodes_next(sequence: Sequence) -> bool:
    """Whether all but its last token, one of its answer, are computed."""
    return sequence.known - sequence.computed == 1 and bool(sequence.generated)


def _may_start(sequence: Sequence) -> bool:
    """Whether it need not wait for the prompt it shares."""
    leader = sequence.leader
    return leader is None or leader.outcome is not None or bool(leader.generated)
