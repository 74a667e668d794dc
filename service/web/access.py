"""The access log: one line for each request, when its answer is through. Never prompts or keys."""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

from service.errors import ClientGone
from service.errors import ServiceError

LOG = logging.getLogger("moorage.access")
# Probes ask every few seconds: these are logged at level debug.
QUIET_ROUTES = frozenset({"/health/live", "/health/ready", "/metrics"})
METHOD = re.compile(r"[A-Z]{1,10}")
NOT_ACCEPTED = "client_closed_request"


class Arrived(Protocol):
    """What is read of a piece of text."""

    @property
    def completion_tokens(self) -> int: ...

    @property
    def finish_reason(self) -> str | None: ...


@dataclass
class Record:
    """What is known of one request. Written by the thread that answers it.

    route: the rule, never the path, which is the client's own words. code: of the error it ended
    with. prompt_tokens: None if nothing went to the engine. Seconds count from the request's head.
    """

    request_id: str
    began: float
    method: str
    route: str
    key: str = ""
    status: int = 0
    code: str | None = None
    prompt_tokens: int | None = None
    first_token_s: float | None = None
    _expected: int = 0
    _tokens: dict[int, int] = field(default_factory=dict)
    _finished: dict[int, str] = field(default_factory=dict)
    _logged: bool = False

    def submitted(self, prompt_tokens: int, answers: int) -> None:
        """Prompts of so many tokens went to the engine; so many answers are expected."""
        self.prompt_tokens = prompt_tokens
        self._expected = answers

    def saw(self, index: int, piece: Arrived) -> None:
        """A piece of one answer arrived."""
        if self.first_token_s is None and piece.completion_tokens > 0:
            self.first_token_s = time.monotonic() - self.began
        self._tokens[index] = piece.completion_tokens
        if piece.finish_reason is not None:
            self._finished[index] = piece.finish_reason

    def failed(self, error: BaseException) -> None:
        """It ended with this; the first error counts."""
        if self.code is None:
            gone = isinstance(error, (ClientGone, GeneratorExit))
            known = error.code if isinstance(error, ServiceError) else ServiceError.code
            self.code = NOT_ACCEPTED if gone else known

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(self._tokens.values())

    def fields(self) -> dict[str, Any]:
        """Names and values of the line; what is not known is left out."""
        if self.code is None and len(self._finished) < self._expected:
            self.code = NOT_ACCEPTED  # a stream that nobody read to its end
        found: dict[str, Any] = {
            "request_id": self.request_id,
            "key": self.key or None,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "seconds": round(time.monotonic() - self.began, 4),
        }
        if self.prompt_tokens is not None:
            found["prompt_tokens"] = self.prompt_tokens
            found["completion_tokens"] = self.completion_tokens
            if self.first_token_s is not None:
                found["first_token_seconds"] = round(self.first_token_s, 4)
            found["finish_reason"] = ",".join(_unique(self._finished)) or None
        found["error"] = self.code
        return {name: value for name, value in found.items() if value is not None}

    def log(self) -> None:
        """Write the line, once."""
        if self._logged:
            return
        self._logged = True
        level = logging.DEBUG if self.route in QUIET_ROUTES else logging.INFO
        if not LOG.isEnabledFor(level):
            return
        said = self.fields()
        text = " ".join(f"{name}={value}" for name, value in said.items())
        LOG.log(level, "%s", text, extra={"fields": {"event": "request", **said}})


def plain_method(method: str) -> str:
    """A method fit for a line; what is none becomes "-"."""
    return method if METHOD.fullmatch(method) else "-"


def _unique(finished: dict[int, str]) -> Sequence[str]:
    """The reasons in the order of the answers, each once."""
    return list(dict.fromkeys(finished[index] for index in sorted(finished)))
