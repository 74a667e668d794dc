"""Errors to the one JSON shape: {"error": {"message", "type", "param", "code"}}."""

import logging
from typing import Any

from flask import Flask
from flask import Response
from flask import g
from flask import jsonify
from flask import request
from werkzeug.exceptions import HTTPException

from service.errors import ClientGone
from service.errors import ServiceError
from service.web.body import short

LOG = logging.getLogger(__name__)


def handle_errors(app: Flask) -> None:
    """Answer every error in the one shape; what nobody expected is logged and not shown."""
    app.register_error_handler(ServiceError, _expected)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)


def internal(request_id: str) -> dict[str, Any]:
    """The error object of an unexpected failure: no detail, an id to find it by."""
    return {
        "message": f"internal error; request id {request_id}",
        "type": ServiceError.type,
        "param": None,
        "code": ServiceError.code,
    }


def log_error(error: ServiceError, request_id: str) -> None:
    """One line; a client's mistake or departure is no warning."""
    level = logging.WARNING if error.status >= 500 else logging.INFO
    if isinstance(error, ClientGone):
        level = logging.INFO
    LOG.log(level, "request %s: %d %s: %s", request_id, error.status, error.code, error.one_line())


def _expected(error: ServiceError) -> Response:
    log_error(error, g.request_id)
    g.record.failed(error)
    return error_response(error)


def error_response(error: ServiceError, **beside: Any) -> Response:
    """The answer to an error, with Retry-After; `beside` are keys next to "error"."""
    response = jsonify({"error": error.as_dict(), **beside})
    response.status_code = error.status
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, int(error.retry_after_s)))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _http(error: HTTPException) -> Response:
    """Werkzeug's own findings, in our words: its texts speak of browsers, in HTML."""
    code = error.code or 500
    path = short(request.path)
    known = {
        404: f"there is nothing at {path}",
        405: f"{short(request.method)} is not done at {path}",
    }
    message = known.get(code, error.name.lower())
    if code >= 500:
        return _unexpected(error)
    body = {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": error.name.lower().replace(" ", "_"),
    }
    g.record.code = body["code"]
    response = jsonify({"error": body})
    response.status_code = code
    for name, value in error.get_headers():
        if name == "Allow":
            response.headers[name] = value
    return response


def _unexpected(error: Exception) -> Response:
    LOG.error("request %s failed", g.request_id, exc_info=error)
    g.record.failed(error)
    response = jsonify({"error": internal(g.request_id)})
    response.status_code = 500
    return response
