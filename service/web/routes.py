"""Routes, each added with what the OpenAPI document says about it: `service.web.openapi`."""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from flask import Flask

from service.errors import ContextTooLong
from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.errors import InvalidRequest
from service.errors import NonFiniteLogits
from service.errors import NotReady
from service.errors import OutOfMemory
from service.errors import Overloaded
from service.errors import PlacementDrifted
from service.errors import RateLimited
from service.errors import SentTooSlowly
from service.errors import ServiceError
from service.errors import StepFailed
from service.errors import TooLarge
from service.errors import UnknownModel
from service.errors import UnsupportedMediaType
from service.errors import UnsupportedParameter
from service.web.values import Shape

EXTENSION = "moorage.operations"
Errors = tuple[type[ServiceError], ...]

# what requests may end with: every one; those about the model; with a body; that compute
EVERY: Errors = (InvalidRequest, ServiceError)
OF_MODEL: Errors = (NotReady, PlacementDrifted)
OF_BODY: Errors = (
    UnsupportedParameter,
    UnknownModel,
    TooLarge,
    UnsupportedMediaType,
    SentTooSlowly,
    Overloaded,
    RateLimited,
    *OF_MODEL,
)
OF_ANSWER: Errors = (
    ContextTooLong,
    NonFiniteLogits,
    StepFailed,
    OutOfMemory,
    EngineStopped,
    DeadlineExceeded,
    *OF_BODY,
)


@dataclass(frozen=True)
class Operation:
    """What a route does, as its users are told.

    gives: what stands in the answer with 200: a TypedDict, a media type that is no JSON, or None if
    there is no such answer. takes: the shape of the JSON body; without one there is none. events:
    the TypedDict of one event, if the answer may be a stream. errors: which it may end with beside
    EVERY. special: TypedDicts of errors with keys of their own, by status. examples: bodies that
    any model answers, by what they show; "model" is put in. said: more than the summary.
    """

    summary: str
    gives: Any
    takes: Shape | None = None
    events: type | None = None
    errors: Errors = ()
    special: Mapping[int, type] = field(default_factory=dict)
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    said: str = ""


def add(
    app: Flask, rule: str, view: Callable[..., Any], operation: Operation, method: str = ""
) -> None:
    """Answer at this path; views have names of their own.

    method: if none is said, POST for an operation with a body, else GET.
    """
    methods = [method or ("GET" if operation.takes is None else "POST")]
    app.add_url_rule(rule, view_func=view, methods=methods)
    operations(app)[view.__name__] = operation


def operations(app: Flask) -> dict[str, Operation]:
    """What was added, by endpoint."""
    found: dict[str, Operation] = app.extensions.setdefault(EXTENSION, {})
    return found
