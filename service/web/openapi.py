"""GET /openapi.json: the document of all routes, made from what checks requests.

Nothing is described a second time: bodies come from their shapes, errors from `service.errors`,
routes from `service.web.routes`, headers from where they are read or written.
"""

import re
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from flask import Flask
from flask import Response
from pydantic import TypeAdapter
from werkzeug.routing import Rule

from service import __version__
from service.deployment import Deployment
from service.errors import ForbiddenHost
from service.errors import NotReady
from service.errors import PlacementDrifted
from service.errors import ServiceError
from service.errors import Unauthorized
from service.web import answers
from service.web import keys
from service.web import routes
from service.web import security
from service.web import sse
from service.web.routes import Operation

JSON = "application/json"
EVENTS = "text/event-stream"
REF = "#/components/schemas/"
NO_MODEL = "the-model-that-is-served"
PATH_PARAMETER = re.compile(r"<(?:\w+:)?(\w+)>")
SCHEME = "key"
KEY = {"type": "http", "scheme": "bearer", "description": "An API key, if any are configured."}
STREAM = (
    "With `stream: true`: one server-sent event. Lines that begin with `:` say nothing. An error"
    " after the first byte is an event."
)
TEXT = {"type": "string"}
# of every answer, of some statuses, and of keys with limits or requests with odd names
ALWAYS = {
    "x-request-id": ("What the request sent, or a fresh one.", security.REQUEST_ID.pattern),
    "openai-processing-ms": ("Milliseconds until the answer began.", "[0-9]+"),
}
RETRY_AFTER = {"Retry-After": ("Whole seconds until it is worth trying again.", "[1-9][0-9]*")}
BY_STATUS = {401: {"WWW-Authenticate": ("Bearer.", "Bearer")}, 429: RETRY_AFTER, 503: RETRY_AFTER}
SOMETIMES = {
    "x-moorage-ignored": "Names of the request that nobody specifies, percent-encoded.",
    "x-ratelimit-limit-requests": "Requests at once, of this key.",
    "x-ratelimit-remaining-requests": "How many more may be open now.",
    "x-ratelimit-limit-tokens": "Tokens per minute, of this key.",
    "x-ratelimit-remaining-tokens": "How many are left.",
    "x-ratelimit-reset-tokens": "When all are there again, as `1.500s`.",
}
PARAMETERS = {
    "X-Request-Id": (
        "Comes back and is logged, if it is 1 to 128 of A-Z, a-z, 0-9, ., _ and -.",
        TEXT,
    ),
    security.TIMEOUT_HEADER: (
        "Seconds that the request may take; the server's own limit holds if it is less.",
        {"type": "string", "pattern": f"^{security.TIMEOUT.pattern}$"},
    ),
    "traceparent": ("W3C trace context.", TEXT),
    "tracestate": ("W3C trace context.", TEXT),
}


def add_routes(app: Flask, deployment: Deployment) -> None:
    keyed = keys.ring(deployment.config).needed
    made: dict[str, bytes] = {}  # by model: it takes a moment, and never changes

    def openapi() -> Response:
        try:
            model = deployment.serving().model_id
        except (NotReady, PlacementDrifted):
            model = NO_MODEL
        if model not in made:
            made[model] = app.json.dumps(document(app, keyed=keyed, model=model)).encode()
        return Response(made[model], mimetype=JSON)

    routes.add(
        app,
        "/openapi.json",
        openapi,
        Operation("This document", dict[str, Any]),
    )


def document(app: Flask, *, keyed: bool, model: str) -> dict[str, Any]:
    """All routes of the app as OpenAPI 3.1. keyed: whether keys are needed. model: for examples.

    Raises LookupError for a route that was not added with `routes.add`.
    """
    schemas = _Schemas()
    paths: dict[str, Any] = {}
    for rule, method in _methods(app):
        known = routes.operations(app).get(rule.endpoint)
        if known is None:
            raise LookupError(
                f"{method} {rule.rule} is in no document; add it with service.web.routes.add"
            )
        locked = keyed and rule.endpoint not in security.OPEN_ENDPOINTS
        item = paths.setdefault(PATH_PARAMETER.sub(r"{\1}", rule.rule), {})
        item[method.lower()] = {
            "operationId": rule.endpoint,
            **_operation(known, rule, schemas, locked=locked, keyed=keyed, model=model),
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Moorage",
            "version": __version__,
            "description": "Models of Hugging Face transformers over HTTP, in OpenAI's shapes. "
            "null means absent. Names that nobody specifies are ignored and told in "
            "x-moorage-ignored.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "./"}],
        "paths": paths,
        "components": {"schemas": schemas.found, "securitySchemes": {SCHEME: KEY}},
    }


def _methods(app: Flask) -> Iterator[tuple[Rule, str]]:
    """Routes in the order they were added. HEAD is wherever GET is, as HTTP has it."""
    for rule in app.url_map.iter_rules():
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            yield rule, method


class _Schemas:
    """The components that answers refer to, each once."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def of(self, kind: type) -> dict[str, Any]:
        """A reference to the schema of a TypedDict; other types as they are."""
        schema = TypeAdapter(kind).json_schema(mode="serialization", ref_template=REF + "{model}")
        for name, inner in schema.pop("$defs", {}).items():
            self.found[name] = _closed(inner)
        if "properties" not in schema:
            return schema
        self.found[kind.__name__] = _closed(schema)
        return {"$ref": REF + kind.__name__}


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Without other keys, and without the titles that repeat each key."""
    properties = schema.get("properties", {}).values()
    for inner in properties:
        inner.pop("title", None)
    return {"additionalProperties": False, **schema} if properties else schema


def _operation(
    known: Operation, rule: Rule, schemas: _Schemas, *, locked: bool, keyed: bool, model: str
) -> dict[str, Any]:
    found: dict[str, Any] = {"summary": known.summary, "parameters": _parameters(rule)}
    if known.said:
        found["description"] = known.said
    found["security"] = [{SCHEME: []}] if locked else []
    if known.takes is not None:
        examples = {
            name: {"value": {**({"model": model} if "model" not in body else {}), **body}}
            for name, body in known.examples.items()
        }
        content = {"schema": known.takes.schema(), "examples": examples}
        found["requestBody"] = {"required": True, "content": {JSON: content}}
    errors = [*routes.EVERY, *known.errors]
    if locked:
        errors.append(Unauthorized)
    elif not keyed:
        errors.append(ForbiddenHost)
    success = {} if known.gives is None else {"200": _success(known, schemas)}
    found["responses"] = {**success, **_failures(errors, known, schemas)}
    return found


def _parameters(rule: Rule) -> list[dict[str, Any]]:
    inside = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in PATH_PARAMETER.findall(rule.rule)
    ]
    headers = [
        {"name": name, "in": "header", "description": said, "schema": schema}
        for name, (said, schema) in PARAMETERS.items()
    ]
    return [*inside, *headers]


def _success(known: Operation, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if isinstance(known.gives, str):
        content[known.gives] = {"schema": TEXT}
    else:
        content[JSON] = {"schema": schemas.of(known.gives)}
    if known.events is not None:
        content[EVENTS] = {"schema": _event(schemas.of(known.events), schemas)}
    return {"description": "Done.", "headers": _headers(200), "content": content}


def _event(event: dict[str, Any], schemas: _Schemas) -> dict[str, Any]:
    """One event of a stream, in which an error is an event too."""
    inside = {"anyOf": [event, schemas.of(answers.Error)]}
    told = {**TEXT, "contentMediaType": JSON, "contentSchema": inside}
    done = {**TEXT, "const": sse.DONE.decode().removeprefix("data: ").strip()}
    data = {"if": done, "then": done, "else": told}
    return {
        "type": "object",
        "description": STREAM,
        "required": ["data"],
        "properties": {"data": data, "event": TEXT},
    }


def _failures(
    errors: list[type[ServiceError]], known: Operation, schemas: _Schemas
) -> dict[str, Any]:
    """One response for each status, whose codes are those of the errors that have it."""
    by_status: dict[int, list[str]] = {}
    for error in errors:
        by_status.setdefault(error.status, []).append(error.code)
    found = {}
    for status, codes in sorted(by_status.items()):
        said = sorted(set(codes))
        one = {"properties": {"error": {"properties": {"code": {"enum": said}}}}}
        shape = schemas.of(known.special.get(status, answers.Error))
        found[str(status)] = {
            "description": ", ".join(f"`{code}`" for code in said),
            "headers": _headers(status),
            "content": {JSON: {"schema": {"allOf": [shape, one]}}},
        }
    return found


def _headers(status: int) -> dict[str, Any]:
    sure: Mapping[str, tuple[str, str]] = {**ALWAYS, **BY_STATUS.get(status, {})}
    found: dict[str, Any] = {
        name: {
            "description": said,
            "required": True,
            "schema": {"type": "string", "pattern": f"^{pattern}$"},
        }
        for name, (said, pattern) in sure.items()
    }
    for name, said in SOMETIMES.items():
        found[name] = {"description": said, "schema": TEXT}
    return found
