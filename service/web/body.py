"""The body of a request: no more than allowed, and one plain JSON object."""

import json
import math
from collections.abc import Mapping
from typing import Any

from service.errors import InvalidRequest
from service.errors import SentTooSlowly
from service.errors import TooLarge
from service.errors import UnsupportedMediaType

MAX_DEPTH = 64
MAX_DIGITS = 20
READ_BYTES = 64 * 1024
SHOWN = 60
PARAM = 200  # characters of a client's own names in `param`


def read_json(environ: Mapping[str, Any], limit_bytes: int) -> dict[str, Any]:
    """The JSON object in the body of a WSGI request.

    Raises UnsupportedMediaType, TooLarge beyond `limit_bytes`, SentTooSlowly, and InvalidRequest
    for everything else.
    """
    _check_type(environ)
    data = _read(environ, limit_bytes)
    if not data:
        raise InvalidRequest("the request has no body; send a JSON object")
    return parse(data)


def parse(data: bytes) -> dict[str, Any]:
    """JSON without NaN, Infinity, and what different readers read differently.

    Raises InvalidRequest for bad UTF-8, a byte order mark, duplicate keys, depth over 64, integers
    over 20 digits, numbers beyond a double's range, lone surrogates, and anything that is not an
    object.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is wrong") from error
    if text.startswith("\ufeff"):
        raise InvalidRequest("the body starts with a byte order mark; send plain UTF-8")
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_number,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"the body is not JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise InvalidRequest(_too_deep()) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {kind(value)}")
    found = _lone_surrogate(value)
    if found is not None:
        # It would pass here and break the tokenizer.
        where = found.removeprefix(".")[:PARAM]
        message = f"{where or 'a key'} has half a surrogate pair"
        raise InvalidRequest(message, param=where or None)
    return value


def kind(value: Any) -> str:
    """What JSON calls a value."""
    names: dict[type, str] = {
        bool: "a boolean",
        str: "a string",
        int: "an integer",
        float: "a number",
        list: "an array",
        dict: "an object",
        type(None): "null",
    }
    return names.get(type(value), "something else")


def short(name: str) -> str:
    """A client's own words for a message: quoted, of limited length, and safe to print."""
    return ascii(name if len(name) <= SHOWN else name[:SHOWN] + "...")


def _check_type(environ: Mapping[str, Any]) -> None:
    content_type = str(environ.get("CONTENT_TYPE", "")).partition(";")[0].strip().lower()
    if content_type != "application/json":
        given = short(content_type) if content_type else "missing"
        raise UnsupportedMediaType(f"the content type is {given}; send application/json")
    encoding = str(environ.get("HTTP_CONTENT_ENCODING", "")).strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType(
            f"the content encoding {short(encoding)} is not done; send the body uncompressed"
        )


def _read(environ: Mapping[str, Any], limit_bytes: int) -> bytes:
    """The body, by its length or its chunks; at most `limit_bytes` and one are read."""
    length = _length(environ)
    if length is None:
        # Without a length only a server that ends the input itself (chunked) can be read to its
        # end.
        wanted = limit_bytes + 1 if environ.get("wsgi.input_terminated") else 0
    elif length > limit_bytes:
        raise _too_large(limit_bytes)
    else:
        wanted = length
    parts: list[bytes] = []
    missing = wanted
    while missing > 0:
        try:
            part = environ["wsgi.input"].read(min(missing, READ_BYTES))
        except (TimeoutError, BlockingIOError) as error:
            raise SentTooSlowly("the body did not arrive in time") from error
        # Each server has errors of its own for a bad chunk or a connection that ended; gunicorn's
        # share no base class with anything but Exception, and all of them mean that the client
        # sent no proper body.
        except Exception as error:
            raise InvalidRequest("the body could not be read to its end") from error
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    data = b"".join(parts)
    if length is None and len(data) > limit_bytes:
        raise _too_large(limit_bytes)
    if length is not None and missing:
        raise InvalidRequest(f"the body ended after {len(data)} of {length} bytes")
    return data


def _length(environ: Mapping[str, Any]) -> int | None:
    text = str(environ.get("CONTENT_LENGTH") or "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise InvalidRequest("the content length is not a number of bytes")
    return int(text)


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit_bytes} bytes that are allowed")


def _too_deep() -> str:
    return f"the body is nested deeper than {MAX_DEPTH} levels"


def _refuse_constant(name: str) -> Any:
    raise InvalidRequest(f"the body is not JSON: {name} is not a number")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise InvalidRequest(f"the body has an integer of {len(text)} characters")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise InvalidRequest(f"the number {short(text)} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise InvalidRequest(
            f"the key {short(twice)} occurs twice in one object", param=twice[:PARAM]
        )
    return value


def _lone_surrogate(value: Any, depth: int = 1) -> str | None:
    """Where a lone surrogate stands, as ".messages[0].content"; None if there is none.

    Raises InvalidRequest for depth. Paths are made on the way back only: a body of a million empty
    arrays must not become a million strings.
    """
    if isinstance(value, str):
        return None if _encodes(value) else ""
    if depth > MAX_DEPTH:
        raise InvalidRequest(_too_deep())
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
        if isinstance(key, str) and not _encodes(key):
            return ""
        if isinstance(item, str | list | dict):
            found = _lone_surrogate(item, depth + 1)
            if found is not None:
                return (f".{key}" if isinstance(key, str) else f"[{key}]") + found
    return None


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
