"""Asking a server that speaks OpenAI's HTTP, ours or another: what `bench` and `chat` share.

Only the standard library and what needs no more, so that the benchmarks can use it, too.
"""

import contextlib
import http.client
import json
import socket
from collections.abc import Generator
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from service.cli.cleaning import clean
from service.errors import NoAnswer

CONNECT_S = 10.0
SILENCE_S = 900.0
LONGEST_LINE = 16 * 2**20
LONGEST_BODY = 64 * 2**20
HINTS = {
    401: "set MOORAGE_API_KEY to a key that the server knows",
    403: "set MOORAGE_API_KEY to a key that may do this",
    404: "give the URL as far as /v1, and with --model a name that the server knows",
    429: "ask less at once, or wait",
    503: "wait until it is ready: GET /health/ready, or its log, says how far it is",
}


class Server:
    """One server, asked from any thread; every request has a connection of its own."""

    def __init__(self, url: str, key: str | None = None, *, silence_s: float = SILENCE_S) -> None:
        """url: http(s)://HOST[:PORT][/PREFIX][/v1], HOST:PORT or unix:PATH.

        key: sent as the bearer. silence_s: how long it may say nothing. Raises ValueError for
        another URL, or a key that cannot be sent.
        """
        self.url, self._silence_s = url, silence_s
        self._socket: str | None = None
        if url.startswith("unix:"):
            self._socket = url.removeprefix("unix:").removeprefix("//")
            self._tls, self._host, self._port, prefix = False, "localhost", 80, ""
        else:
            self.url = url = url if "://" in url else f"http://{url}"
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no address of a server; write http://127.0.0.1:8000")
            if parts.username is not None or parts.query or parts.fragment:
                raise ValueError("an address has no user, query or fragment; keys are variables")
            self._tls, self._host = parts.scheme == "https", parts.hostname
            self._port = parts.port or (443 if self._tls else 80)
            prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._base = f"{prefix}/v1"
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key has characters that no header may have")
        self._headers = {"Content-Type": "application/json", "Accept": "*/*"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def models(self) -> list[str]:
        """Ids of what it serves. Raises NoAnswer."""
        with self._request("GET", "/models") as response:
            document = self._document(response)
        entries = document.get("data")
        listed = entries if isinstance(entries, list) else []
        return [str(entry["id"]) for entry in listed if isinstance(entry, dict) and "id" in entry]

    def first_model(self) -> str:
        """The first it lists. Raises NoAnswer, also if it lists none."""
        found = self.models()
        if not found:
            raise NoAnswer(f"{self.url} lists no model", hint="name one with --model")
        return found[0]

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The events of one request, which closes its connection when the caller closes it.

        path: below /v1. Raises NoAnswer for a refusal, an error event, or a stream that breaks off.
        """
        with self._request("POST", path, json.dumps({**body, "stream": True})) as response:
            yield from events(response)

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: str | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer with status 200. Whatever goes wrong until it is read is a NoAnswer."""
        connection = self._connection()
        try:
            connection.connect()
            connection.sock.settimeout(self._silence_s)
            connection.request(method, self._base + path, body, self._headers)
            with connection.getresponse() as response:
                if response.status != 200:
                    raise self._refused(response)
                yield response
        except TimeoutError:
            told = f"{self.url} says nothing"
            raise NoAnswer(told, hint="its log says what it does; is the URL right?") from None
        except http.client.HTTPException as error:
            told = f"{self.url} does not speak HTTP as it should: {type(error).__name__}"
            raise NoAnswer(told, hint="is the URL right: http or https?") from None
        except OSError as error:
            told = f"cannot talk to {self.url}: {error.strerror or error}"
            hint = "start the server, or give the URL that its log shows"
            raise NoAnswer(told, hint=hint) from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._socket is not None:
            return _UnixConnection(self._socket)
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=CONNECT_S)

    def _document(self, response: http.client.HTTPResponse) -> dict[str, Any]:
        try:
            document = json.loads(response.read(LONGEST_BODY))
        except ValueError:
            document = None
        if not isinstance(document, dict):
            hint = "is the URL right? It must be of a server that speaks OpenAI's API"
            raise NoAnswer(f"{self.url} answers with something else than JSON", hint=hint)
        return document

    def _refused(self, response: http.client.HTTPResponse) -> NoAnswer:
        """What the server says, in whatever shape it says it."""
        text = response.read(100_000).decode(errors="replace")
        try:
            said = json.loads(text)
            told = said.get("error", said)
            message = str(told.get("message", told) if isinstance(told, dict) else told)
        except (ValueError, AttributeError):
            message = " ".join(text.split())[:200] or response.reason
        wait = clean(response.headers.get("Retry-After") or "")
        hint = HINTS.get(response.status)
        error = NoAnswer(
            f"{self.url} refused with status {response.status}: {clean(message)}",
            hint=f"{hint} (Retry-After: {wait} s)" if hint and wait else hint,
        )
        error.answered = response.status
        return error


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream as they come.

    Raises NoAnswer for an error event, for what is no JSON, and when the stream just stops, with
    neither a reason to finish nor [DONE]: such an answer is not complete.
    """
    finished = False
    while line := response.readline(LONGEST_LINE):
        field, _, data = line.partition(b":")
        if field != b"data":
            continue  # a comment, a name, the empty line between two events
        if data.strip() == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise NoAnswer(f"an event is no JSON: {data[:80]!r}") from None
        if not isinstance(event, dict):
            raise NoAnswer(f"an event is no JSON object: {data[:80]!r}")
        if error := event.get("error"):
            message = error.get("message", error) if isinstance(error, dict) else error
            raise NoAnswer(f"the answer broke off: {clean(str(message))}")
        finished = finished or any(
            choice.get("finish_reason") for choice in event.get("choices") or ()
        )
        yield event
    if not finished:
        raise NoAnswer("the answer broke off: the stream has no end")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_S)
        self.sock.connect(self._path)
