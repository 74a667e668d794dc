"""Every error Moorage raises on purpose, as one tree.

An error names the thing, the fact and the way out. What a user sees of it is decided here and
nowhere else: the HTTP status, the OpenAI error `type` and `code`, the exit status of a command,
and the hint. This module imports nothing, so the gunicorn master can use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class ServiceError(Exception):
    """Base of every expected error.

    Class attributes are the defaults of the kind: `status` (HTTP), `type` and `code` (OpenAI's
    error object), `exit_status` (of the command or of the server when it happens at start).
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    exit_status = 1
    retry_after_s: int | None = None

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        failure_class: str | None = None,
        tensors: Sequence[str] = (),
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.failure_class = failure_class
        self.tensors = tuple(tensors)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    def as_dict(self) -> dict[str, Any]:
        """The `error` object of the one JSON error shape."""
        body: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.failure_class is not None:
            body["failure_class"] = self.failure_class
        if self.tensors:
            body["tensors"] = list(self.tensors)
        if self.hint is not None:
            body["hint"] = self.hint
        return body

    def bare(self) -> "ServiceError":
        """This error without traceback and cause: it keeps no frame, and no model, alive."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)

    def one_line(self) -> str:
        """Message and hint in one line, for terminals and logs."""
        text = " ".join(self.message.split())
        return text if self.hint is None else f"{text}  fix: {' '.join(self.hint.split())}"


# --- at start: the deployment cannot be served


class StartupError(ServiceError):
    """The deployment cannot be served as configured."""

    status = 503
    code = "startup_failed"


@dataclass(frozen=True)
class Problem:
    """One thing wrong in the operator's words.

    `where` is "moorage.yaml:10:5", "env QUANTIZE" or "flag --set"; `source` is the offending line
    and `column` (from 1) is where the caret goes. A message that starts with "KEY is" or
    "KEY has" is a whole sentence, and the key is not printed a second time.
    """

    where: str
    key: str
    message: str
    source: str | None = None
    column: int | None = None

    def headline(self) -> str:
        """Where, what and the fact, without the line of the file."""
        named = not self.key or self.message.startswith((f"{self.key} is ", f"{self.key} has "))
        key = "" if named else f" {self.key}:"
        return f"{self.where}:{key} {self.message}"

    def __str__(self) -> str:
        if self.source is None or self.column is None:
            return self.headline()
        return f"{self.headline()}\n   {self.source}\n   {' ' * (self.column - 1)}^"


class ConfigError(StartupError):
    """A key, value, variable or flag is wrong; every mistake is listed, in `problems`."""

    code = "invalid_config"
    exit_status = 3

    def __init__(self, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        super().__init__("\n".join(str(problem) for problem in problems), hint=hint)
        self.problems = tuple(problems)

    def one_line(self) -> str:
        """Every mistake without its line of the file, for logs."""
        text = "; ".join(problem.headline() for problem in self.problems)
        return text if self.hint is None else f"{text}  fix: {self.hint}"


class PlacementUnavailable(StartupError):
    """A device or a package that the strategy needs is missing."""

    code = "placement_unavailable"
    exit_status = 4


class DoesNotFit(StartupError):
    """The model with its KV cache does not fit the devices the strategy may use."""

    code = "does_not_fit"
    exit_status = 4


class ModelUnavailable(StartupError):
    """The model's files are missing, damaged or not allowed."""

    code = "model_unavailable"
    exit_status = 6


class PluginError(StartupError):
    """A strategy cannot be found or imported, or breaks its contract."""

    code = "plugin_error"
    exit_status = 7


class LoadFailed(StartupError):
    """`load` raised, hung or left no model, or another load poisoned the process."""

    code = "load_failed"
    exit_status = 1


class PlacementMismatch(StartupError):
    """A tensor is not where the plan put it; the certificate is refused."""

    code = "placement_mismatch"
    exit_status = 8


class ControlFailed(StartupError):
    """`moorage reload` did not reach the server, or was refused; nothing has changed."""

    code = "control_failed"


class NoAnswer(StartupError):
    """A server that `moorage bench` or `chat` asks is not there, refuses, or breaks off.

    answered: the HTTP status of a refusal.
    """

    code = "no_answer"
    answered: int | None = None


# --- while serving: this request cannot be answered


class RequestError(ServiceError):
    """This request cannot be answered; others are unaffected."""


class InvalidRequest(RequestError):
    """The request is malformed or asks for something we do not do; `param` says which field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A field that is specified, would change the answer, and is not done."""

    code = "unsupported_parameter"


class ContextTooLong(InvalidRequest):
    """Prompt plus requested tokens exceed the context of the model."""

    code = "context_length_exceeded"


class Unauthorized(RequestError):
    """No API key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ForbiddenHost(RequestError):
    """The `Host` header is no name of this machine: most likely DNS rebinding."""

    status = 403
    type = "permission_error"
    code = "forbidden_host"


class UnknownModel(RequestError):
    """`model` is not what is served."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownResponse(RequestError):
    """A response was asked for by its id: none is stored."""

    status = 404
    type = "invalid_request_error"
    code = "response_not_found"


class UnknownFile(RequestError):
    """A page of this server has no such file."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class TooLarge(RequestError):
    """The body exceeds `server.max_body`."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(RequestError):
    """The body is not `application/json`."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class ClientGone(RequestError):
    """The client left before its answer was complete; nobody reads this, the log does."""

    status = 499
    type = "invalid_request_error"
    code = "client_closed_request"


class Overloaded(RequestError):
    """The queue is full; try again after `retry_after_s`, which `Retry-After` says."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after_s = 1


class RateLimited(RequestError):
    """This API key's `server.key_limits` are used up; try again after `retry_after_s`."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_s = 1


class NonFiniteLogits(RequestError):
    """The logits of this sequence were NaN or infinite; nothing was sampled from them."""

    code = "non_finite_logits"


class StepFailed(RequestError):
    """The model's forward raised for this sequence."""

    code = "step_failed"


class OutOfMemory(RequestError):
    """The device had no memory for this sequence, even alone in its step; others go on."""

    status = 503
    code = "out_of_memory"
    retry_after_s = 5


class NotReady(RequestError):
    """No proven model yet, or no longer; for a readiness probe also: a step hangs."""

    status = 503
    code = "not_ready"
    retry_after_s = 5


class PlacementDrifted(RequestError):
    """The model is no longer what was proven: a tensor moved or cast, a hook lost, a NaN."""

    status = 503
    code = "placement_drifted"
    retry_after_s = 5


class EngineStopped(RequestError):
    """The server stops, or the engine died, while the sequence was waiting or running."""

    status = 503
    code = "engine_stopped"
    retry_after_s = 5


class DeadlineExceeded(RequestError):
    """It took longer than `server.request_timeout_s`, or than the request itself allowed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class SentTooSlowly(RequestError):
    """The body took longer than a minute, or stalled."""

    status = 408
    type = "timeout_error"
    code = "sent_too_slowly"


class ReadTooSlowly(RequestError):
    """The client left 4,096 tokens unread; its sequence was ended."""

    status = 408
    type = "timeout_error"
    code = "read_too_slowly"
