"""Browsers: which web pages may read answers. None, unless `server.cors_origins` names them."""

from collections.abc import Sequence

from flask import Response
from flask import request
from werkzeug.exceptions import MethodNotAllowed

METHODS = "GET, POST"
HEADERS = "Authorization, Content-Type, X-Request-Id, X-Request-Timeout-S"
READABLE = (
    "x-request-id, openai-processing-ms, retry-after, x-moorage-ignored, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
OPENAI_HEADERS = "x-stainless-"
ANY = "*"
MAX_AGE_S = 600


def preflight(origins: Sequence[str]) -> Response | None:
    """The answer to a browser that asks first, without a key; None if this is no such request.

    From a page that is not allowed it stays what it is: a method that is not done here.
    """
    asked = request.headers.get("Access-Control-Request-Method")
    if request.method != "OPTIONS" or asked is None or not _allowed(origins):
        return None
    if not isinstance(request.routing_exception, MethodNotAllowed):
        return None  # there is nothing at this path
    answer = Response(status=200)
    answer.headers["Access-Control-Allow-Methods"] = METHODS
    answer.headers["Access-Control-Allow-Headers"] = ", ".join([HEADERS, *_stainless()])
    answer.headers["Access-Control-Max-Age"] = str(MAX_AGE_S)
    return answer


def allow(response: Response, origins: Sequence[str]) -> None:
    """Let the page read this answer, if it may. Never with cookies."""
    if not origins:
        return
    response.vary.add("Origin")
    if _allowed(origins):
        given = ANY if ANY in origins else request.headers["Origin"]
        response.headers["Access-Control-Allow-Origin"] = given
        response.headers["Access-Control-Expose-Headers"] = READABLE


def _allowed(origins: Sequence[str]) -> bool:
    given = request.headers.get("Origin")
    return given is not None and (ANY in origins or given in origins)


def _stainless() -> list[str]:
    """Headers of OpenAI's own client, which sends a dozen that say nothing to us."""
    asked = request.headers.get("Access-Control-Request-Headers", "").lower().split(",")
    names = (name.strip() for name in asked[:64])
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
    return [n for n in names if n.startswith(OPENAI_HEADERS) and not set(n) - set(letters)]
