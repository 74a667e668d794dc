"""Who may ask, and the headers every answer has."""

import ipaddress
import re
import time
import uuid
from collections.abc import Collection
from collections.abc import Sequence
from urllib.parse import quote
from urllib.parse import urlsplit

from flask import Flask
from flask import Response
from flask import g
from flask import request
from werkzeug.exceptions import MethodNotAllowed

from service.config.address import is_loopback
from service.config.schema import Config
from service.errors import ForbiddenHost
from service.errors import InvalidRequest
from service.errors import Unauthorized
from service.web import cors
from service.web import keys
from service.web.access import Observer
from service.web.access import Record
from service.web.access import plain_method
from service.web.body import short
from service.web.limits import Accounts

# Everything else needs a key when keys are configured. Endpoints by name, so that no spelling of a
# path matters.
HEALTH = frozenset({"health", "health_live", "health_ready"})
# The same files everywhere: a page asks for a key itself, to fetch what it shows.
PAGES = frozenset({"page", "page_file", "docs", "docs_script", "docs_bundle", "docs_style"})
OPEN_ENDPOINTS = HEALTH | PAGES
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
TIMEOUT_HEADER = "X-Request-Timeout-S"
TIMEOUT = re.compile(r"(?!0+(\.0+)?$)[0-9]{1,9}(\.[0-9]{1,6})?")
# https://www.w3.org/TR/trace-context/: the trace's id, and the caller's; neither may be zero.
TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
MAX_TRACESTATE = 512
IGNORED_NAMES = 20
IGNORED_CHARACTERS = 64
# No answer is a page but / and /docs, which have a policy of their own (`service.web.files`).
# `Cross-Origin-Resource-Policy` keeps other pages from embedding answers; what cors_origins allows
# is read by fetch, which it does not concern.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def guard(
    app: Flask, config: Config, accounts: Accounts, observers: Sequence[Observer] = ()
) -> None:
    """Check every request before its view, and put the common headers on every response.

    observers: called with the record of every request, when its answer is through.
    """
    ring = keys.ring(config)
    server = config.server
    hosts = _hosts(config) if not ring.needed else None

    def check() -> Response | None:
        if request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1" and not request.headers.get("Host"):
            raise InvalidRequest("the Host header is missing")
        if hosts is not None:
            _check_host(hosts)
        preflight = cors.preflight(server.cors_origins)
        if preflight is not None:
            return preflight
        if isinstance(request.routing_exception, MethodNotAllowed):
            return None  # Flask raises it next
        if ring.needed and request.endpoint not in OPEN_ENDPOINTS:
            _require_key(ring)
        g.deadline = g.started + _timeout_s(server.request_timeout_s)
        return None

    def finish(response: Response) -> Response:
        for name, value in accounts.of(g.record.key).headers().items():
            response.headers[name] = value
        cors.allow(response, server.cors_origins)
        return _finish(response)

    app.before_request(lambda: _begin(observers))
    app.before_request(check)
    app.after_request(finish)


def _begin(observers: Sequence[Observer]) -> None:
    g.started = time.monotonic()
    g.ignored = []
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    route = request.url_rule.rule if request.url_rule is not None else "-"
    g.record = Record(g.request_id, g.started, plain_method(request.method), route)
    g.record.observers = observers
    parent = TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    if parent is not None:
        g.record.traceparent, g.record.trace_id = parent[0], parent[1]
        g.record.tracestate = request.headers.get("tracestate", "")[:MAX_TRACESTATE]


def _finish(response: Response) -> Response:
    headers = response.headers
    headers["x-request-id"] = g.request_id
    headers["openai-processing-ms"] = str(round((time.monotonic() - g.started) * 1000))
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    if g.ignored:
        # The names are the client's own words: encoded, or they could add headers of their own.
        names = [quote(n[:IGNORED_CHARACTERS], safe="[]._-") for n in g.ignored[:IGNORED_NAMES]]
        headers["x-moorage-ignored"] = ", ".join(names)
    g.record.status = response.status_code
    if request.method == "HEAD":  # werkzeug does not close an answer without a body
        g.record.log()
    else:
        response.call_on_close(g.record.log)
    return response


def _require_key(ring: keys.KeyRing) -> None:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("an API key is needed: send the header Authorization: Bearer KEY")
    # WSGI hands out header bytes as latin-1.
    name = ring.name_of(key.strip().encode("latin-1", "replace"))
    if name is None:
        raise Unauthorized("this API key is not known")
    g.record.key = name


def _timeout_s(most_s: float) -> float:
    """Seconds this request may take: what its header says, and no more than `most_s`."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return most_s
    if not TIMEOUT.fullmatch(given):
        raise InvalidRequest(
            f"{TIMEOUT_HEADER} is {short(given)}; give seconds, more than 0", param=TIMEOUT_HEADER
        )
    return min(float(given), most_s)


def _hosts(config: Config) -> Collection[str] | None:
    """Names a Host header may have beside localhost and addresses; None if any will do.

    A server for this machine only, without keys, is protected by its address alone. A page in a
    browser on this machine gets round that with a name of its own that suddenly means 127.0.0.1
    (DNS rebinding), but its requests then carry that name.
    """
    bind = config.server.bind
    if bind.startswith("unix:") or not is_loopback(bind):
        return None
    allowed = (urlsplit(origin).hostname for origin in config.server.cors_origins)
    return frozenset({"localhost", *filter(None, allowed)})


def _check_host(hosts: Collection[str]) -> None:
    given = request.headers.get("Host", "")
    name = given.rpartition(":")[0] if re.search(r":[0-9]*$", given) else given
    name = name.strip("[]").rstrip(".").lower()
    if name in hosts or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise ForbiddenHost(
            f"the Host header is {short(given)}, which is no name of this machine",
            hint="use localhost or an address; or configure API keys, which allow every name",
        ) from None
