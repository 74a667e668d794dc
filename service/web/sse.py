"""Server-sent events, as OpenAI's clients read them."""

import json
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from flask import Response

from service.errors import ClientGone
from service.errors import ServiceError
from service.web import failures

# Between comments while nothing else is sent: proxies keep the connection, and a client that left
# is noticed.
HEARTBEAT_S = 5.0
DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"


def frame(event: Mapping[str, Any]) -> bytes:
    """One event, named by its `type` if it has one. JSON has no raw line ends, so a single data
    line is enough.
    """
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
    name = b"event: " + event["type"].encode() + b"\n" if "type" in event else b""
    return name + b"data: " + data + b"\n\n"


def stream(
    events: Iterator[Mapping[str, Any] | None],
    request_id: str,
    failed: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ending: bytes,
) -> Iterator[bytes]:
    """Events as bytes; None is a moment without news, now and then a comment.

    ending: what follows the last event. An error becomes the event that `failed` makes of it and
    the stream ends without `ending`: a stream that just stops looks complete.
    """
    sent = time.monotonic()
    try:
        for event in events:
            if event is None and time.monotonic() - sent < HEARTBEAT_S:
                continue
            yield HEARTBEAT if event is None else frame(event)
            sent = time.monotonic()
        yield ending
    except ClientGone as error:
        failures.log_error(error, request_id)
    except ServiceError as error:
        failures.log_error(error, request_id)
        yield frame(failed(error.as_dict()))
    except Exception:  # the status line has been sent; the client must still learn that this failed
        failures.LOG.exception("request %s failed in its stream", request_id)
        yield frame(failed(failures.internal(request_id)))


def response(body: Iterator[bytes]) -> Response:
    """A streaming response that no proxy should hold back."""
    answer = Response(body, mimetype="text/event-stream")
    answer.headers["Cache-Control"] = "no-cache, no-store, no-transform"
    answer.headers["X-Accel-Buffering"] = "no"
    return answer
