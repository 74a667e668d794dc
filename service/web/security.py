"""Who may ask, and the headers every answer has."""

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Sequence
from urllib.parse import quote

from flask import Flask
from flask import Response
from flask import g
from flask import request
from pydantic import SecretStr
from werkzeug.exceptions import MethodNotAllowed

from service.errors import InvalidRequest
from service.errors import Unauthorized

# Everything else needs a key when keys are configured. Endpoints by name, so that no spelling of a
# path matters.
OPEN_ENDPOINTS = frozenset({"health_live", "health_ready"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
IGNORED_NAMES = 20
IGNORED_CHARACTERS = 64


def guard(app: Flask, api_keys: Sequence[SecretStr]) -> None:
    """Check every request before its view, and put the common headers on every response."""
    digests = [_digest(key.get_secret_value().encode()) for key in api_keys]

    def check() -> None:
        if request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1" and not request.headers.get("Host"):
            raise InvalidRequest("the Host header is missing")
        if isinstance(request.routing_exception, MethodNotAllowed):
            return  # Flask raises it next
        if digests and request.endpoint not in OPEN_ENDPOINTS:
            _require_key(digests)

    app.before_request(_begin)
    app.before_request(check)
    app.after_request(_finish)


def _begin() -> None:
    g.started = time.monotonic()
    g.ignored = []
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _finish(response: Response) -> Response:
    headers = response.headers
    headers["x-request-id"] = g.request_id
    headers["openai-processing-ms"] = str(round((time.monotonic() - g.started) * 1000))
    headers["X-Content-Type-Options"] = "nosniff"
    headers.setdefault("Cache-Control", "no-store")
    if g.ignored:
        # The names are the client's own words: encoded, or they could add headers of their own.
        names = [quote(n[:IGNORED_CHARACTERS], safe="[]._-") for n in g.ignored[:IGNORED_NAMES]]
        headers["x-moorage-ignored"] = ", ".join(names)
    return response


def _require_key(digests: Sequence[bytes]) -> None:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("an API key is needed: send the header Authorization: Bearer KEY")
    # WSGI hands out header bytes as latin-1.
    given = _digest(key.strip().encode("latin-1", "replace"))
    # All keys are compared, so that the time taken says nothing about which one was near.
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    if not any(matches):
        raise Unauthorized("this API key is not known")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
