"""The access log: one line for each request, when its answer is through. Never prompts or keys."""

import logging
import re
import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

from service.errors import ClientGone
from service.errors import ServiceError

LOG = logging.getLogger("moorage.access")
# Probes ask every few seconds: these are logged at level debug.
QUIET_ROUTES = frozenset(
    {"/health", "/health/live", "/health/ready", "/metrics", "/placement", "/page/<name>"}
)
METHOD = re.compile(r"[A-Z]{1,10}")
NOT_ACCEPTED = "client_closed_request"


class Arrived(Protocol):
    """What is read of a piece of text."""

    @property
    def completion_tokens(self) -> int: ...

    @property
    def finish_reason(self) -> str | None: ...


class Queued(Protocol):
    """What is read of a sequence in the engine: seconds of `time.monotonic`, and tokens."""

    @property
    def admitted_at(self) -> float | None: ...

    @property
    def prompt_tokens(self) -> int: ...


@dataclass
class Answer:
    """One sequence, as the thread that answers saw it arrive. Times are of `time.monotonic`.

    gaps_s: between one token and the next, one for each token after the first.
    """

    stream: Queued
    tokens: int = 0
    first_at: float | None = None
    last_at: float | None = None
    finish_reason: str | None = None
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))

    def saw(self, piece: Arrived, now: float) -> None:
        """A piece arrived; several tokens of one piece share the time since the last."""
        fresh = piece.completion_tokens - self.tokens
        if fresh > 0:
            if self.last_at is None:
                self.first_at = now
                self.gaps_s.extend([0.0] * (fresh - 1))
            else:
                self.gaps_s.extend([(now - self.last_at) / fresh] * fresh)
            self.last_at = now
            self.tokens = piece.completion_tokens
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason


@dataclass
class Record:
    """What is known of one request. Written by the thread that answers it.

    route: the rule, never the path, which is the client's own words. traceparent, tracestate: the
    client's, unchecked. trace_id: of the trace it belongs to, 32 hexadecimal digits, or "".
    observers: called once, at the end, before the line is written. code: of the error it ended
    with; fault: whether that was the server's own. prompt_tokens: None if nothing went to the
    engine. Seconds count from the request's head, times are of `time.monotonic`.
    """

    request_id: str
    began: float
    method: str
    route: str
    key: str = ""
    traceparent: str = ""
    tracestate: str = ""
    trace_id: str = ""
    observers: Sequence["Observer"] = ()
    status: int = 0
    code: str | None = None
    fault: bool = False
    model: str = ""
    prompt_tokens: int | None = None
    submitted_at: float | None = None
    answers: tuple[Answer, ...] = ()
    seconds: float = 0.0
    _logged: bool = False

    def submitted(self, model: str, prompt_tokens: int, streams: Sequence[Queued]) -> None:
        """Prompts of so many tokens went to the engine; these are their answers."""
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.submitted_at = time.monotonic()
        self.answers = tuple(Answer(stream) for stream in streams)

    def saw(self, index: int, piece: Arrived) -> None:
        """A piece of one answer arrived."""
        self.answers[index].saw(piece, time.monotonic())

    def failed(self, error: BaseException) -> None:
        """It ended with this; the first error counts."""
        if self.code is None:
            gone = isinstance(error, (ClientGone, GeneratorExit))
            known = error.code if isinstance(error, ServiceError) else ServiceError.code
            self.code = NOT_ACCEPTED if gone else known
            self.fault = not gone and getattr(error, "status", 500) >= 500

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """The reasons in the order of the answers, each once."""
        said = (answer.finish_reason for answer in self.answers)
        return tuple(dict.fromkeys(reason for reason in said if reason is not None))

    @property
    def admitted_at(self) -> float | None:
        """When the first of its sequences left the queue."""
        found = (answer.stream.admitted_at for answer in self.answers)
        return min((at for at in found if at is not None), default=None)

    @property
    def first_at(self) -> float | None:
        """When the first token of any answer was there."""
        found = (answer.first_at for answer in self.answers)
        return min((at for at in found if at is not None), default=None)

    @property
    def queue_s(self) -> float | None:
        """In the queue, until the first of its sequences left it."""
        return queued_s(self.submitted_at, self.admitted_at)

    def fields(self) -> dict[str, Any]:
        """Names and values of the line; what is not known is left out."""
        found: dict[str, Any] = {
            "request_id": self.request_id,
            "trace_id": self.trace_id or None,
            "key": self.key or None,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.prompt_tokens is not None:
            found["prompt_tokens"] = self.prompt_tokens
            found["completion_tokens"] = self.completion_tokens
            if self.queue_s is not None:
                found["queue_seconds"] = round(self.queue_s, 4)
            if self.first_at is not None:
                found["first_token_seconds"] = round(self.first_at - self.began, 4)
            found["finish_reason"] = ",".join(self.finish_reasons) or None
        found["error"] = self.code
        return {name: value for name, value in found.items() if value is not None}

    def log(self) -> None:
        """Tell the observers and write the line, once."""
        if self._logged:
            return
        self._logged = True
        self.seconds = time.monotonic() - self.began
        if self.code is None and any(answer.finish_reason is None for answer in self.answers):
            self.code = NOT_ACCEPTED  # a stream that nobody read to its end
        for observe in self.observers:
            observe(self)
        level = logging.DEBUG if self.route in QUIET_ROUTES else logging.INFO
        if not LOG.isEnabledFor(level):
            return
        said = self.fields()
        text = " ".join(f"{name}={value}" for name, value in said.items())
        LOG.log(level, "%s", text, extra={"fields": {"event": "request", **said}})


Observer = Callable[[Record], None]


def queued_s(submitted_at: float | None, admitted_at: float | None) -> float | None:
    """Seconds between the two; the engine may have admitted before this thread noted the time."""
    if submitted_at is None or admitted_at is None:
        return None
    return max(0.0, admitted_at - submitted_at)


def plain_method(method: str) -> str:
    """A method fit for a line; what is none becomes "-"."""
    return method if METHOD.fullmatch(method) else "-"
