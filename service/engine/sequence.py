"""One prompt being continued, and the stream of its tokens to one client.

`Stream` is the only object that an HTTP thread and the engine thread both touch. Token ids cross
it, text does not.
"""

import threading
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Literal

from service.errors import ServiceError

if TYPE_CHECKING:
    from service.engine.sampling import Sampler

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one sequence are chosen. Values are checked before they get here.

    temperature 0 is greedy. top_k 0 and top_p 1.0 are off. Tokens in `stop_ids` end the sequence
    and are not delivered. With `seed` the result does not depend on what runs beside it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()


class Stream:
    """Tokens of one sequence, from the engine thread to one HTTP thread."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._pending: list[int] = []
        self._error: ServiceError | None = None
        self._ended = False
        self._cancelled = False
        self._changed = threading.Condition()

    # --- HTTP thread

    def read(self, timeout_s: float | None = None) -> list[int]:
        """Wait for tokens and return all that arrived; an empty list means the sequence has ended.

        Raises TimeoutError when nothing came within `timeout_s` (the caller looks after its client
        and calls again), or the ServiceError with which the sequence failed, after the tokens
        before it were read.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._pending or self._ended, timeout_s):
                raise TimeoutError
            tokens, self._pending = self._pending, []
            if not tokens and self._error is not None:
                raise self._error
            return tokens

    def cancel(self) -> None:
        """Nobody wants the rest: the sequence is dropped at the next step. Any time, any thread."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def ended(self) -> bool:
        """No token will follow; some may still be unread."""
        return self._ended

    # --- engine thread

    def put(self, token: int) -> None:
        """Deliver a token. Ignored after the end, which another thread may cause during a step."""
        with self._changed:
            if not self._ended:
                self._pending.append(token)
                self.completion_tokens += 1
                self._changed.notify()

    # --- engine thread, or the thread that stops the engine

    def end(self, reason: FinishReason) -> None:
        """End in good order. The first end or failure stands; later ones do nothing."""
        with self._changed:
            if not self._ended:
                self._ended = True
                self.finish_reason = reason
                self._changed.notify_all()

    def fail(self, error: ServiceError) -> None:
        """End with an error; what was delivered before stays readable."""
        with self._changed:
            if not self._ended:
                self._ended = True
                self._error = error
                self._changed.notify_all()


@dataclass(eq=False)
class Sequence:
    """Engine-side state of one prompt; never seen by an HTTP thread after it has been submitted.

    id: the engine's own, never a client's. computed: how many tokens of prompt and answer the model
    has seen. deadline: `time.monotonic()` seconds, or None. outcome: how it ended, set once by the
    scheduler.
    """

    id: int
    prompt: Ids[int]
    params: SamplingParams
    stream: Stream
    deadline: float | None = None
    generated: list[int] = field(default_factory=list)
    computed: int = 0
    outcome: FinishReason | ServiceError | None = None
    sampler: "Sampler | None" = None

    @property
    def known(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.generated)

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens `start` to `stop` of prompt and answer together."""
        cut = len(self.prompt)
        return (
            *self.prompt[start : min(stop, cut)],
            *self.generated[max(start - cut, 0) : max(stop - cut, 0)],
        )

    def close_stream(self) -> None:
        """Tell the client how it ended. Does nothing while `outcome` is None."""
        if isinstance(self.outcome, ServiceError):
            self.stream.fail(self.outcome)
        elif self.outcome is not None:
            self.stream.end(self.outcome)
