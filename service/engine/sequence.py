"""One prompt being continued, and the stream of its tokens to one client.

`Stream` is the only object that an HTTP thread and the engine thread both touch. Token ids cross
it, text does not.
"""

import threading
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Literal

from service.engine.params import SamplingParams
from service.errors import ReadTooSlowly
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.engine.choosing import Chosen
    from service.engine.state import State

FinishReason = Literal["stop", "length", "cancelled"]

# A client that leaves so many tokens unread does not read: its sequence is ended, so that neither
# memory nor anybody's time is spent on it.
MOST_UNREAD = 4096


class Stream:
    """Tokens of one sequence, from the engine thread to one HTTP thread.

    logprobs: one entry for each delivered token if the request asked for them, in the same order;
    an entry is there before its token can be read. prompt_logprobs: the same for the tokens of the
    prompt from the second on, all there before the first token. ending: the stop id that ended the
    answer, which is not delivered. cached_tokens: of the prompt, found computed. admitted_at: when
    it first left the queue, on the engine's clock; None while it waits. embedding: of the prompt,
    if that was wanted, little-endian float32; there before the end.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[Chosen] = []
        self.prompt_logprobs: list[Chosen] = []
        self.ending: Chosen | None = None
        self.cached_tokens = 0
        self.embedding: bytes | None = None
        self.admitted_at: float | None = None
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

    def put(self, token: int, logprobs: "Chosen | None" = None) -> None:
        """Deliver a token. Ignored after the end, which another thread may cause during a step."""
        with self._changed:
            if self._ended:
                return
            if logprobs is not None:
                self.logprobs.append(logprobs)
            self._pending.append(token)
            self.completion_tokens += 1
            self._changed.notify()

    @property
    def overflow(self) -> ServiceError | None:
        """The error to end the sequence with if its client leaves too many tokens unread."""
        if len(self._pending) <= MOST_UNREAD:
            return None
        return ReadTooSlowly(f"The client left {MOST_UNREAD} tokens unread; the answer was ended.")

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

    id: the engine's own, never a client's. deadline: seconds on the engine's clock, or None.
    owner: who asked, for fairness. leader: a sequence with the same prompt, whose computed prompt
    this one waits for and shares. computed: how many tokens of prompt and answer have their keys
    and values in memory. hold: where in memory those are, the memory's own. choice: what
    choosing its tokens remembers. outcome: how it ended, set once by the scheduler.
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    stream: Stream
    deadline: float | None = None
    owner: str = ""
    leader: "Sequence | None" = None
    number: int = 0
    generated: list[int] = field(default_factory=list)
    computed: int = 0
    hold: object | None = None
    choice: "State | None" = None
    outcome: FinishReason | ServiceError | None = None

    @property
    def known(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be chosen."""
        return self.params.max_tokens - len(self.generated)

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens `start` to `stop` of prompt and answer together."""
        cut = len(self.prompt)
        if stop <= cut:
            return self.prompt[start:stop]
        if start >= cut:
            return tuple(self.generated[start - cut : stop - cut])
        return (*self.prompt[start:], *self.generated[: stop - cut])

    def close_stream(self) -> None:
        """Tell the client how it ended. Does nothing while `outcome` is None."""
        if isinstance(self.outcome, ServiceError):
            self.stream.fail(self.outcome)
        elif self.outcome is not None:
            self.stream.end(self.outcome)
