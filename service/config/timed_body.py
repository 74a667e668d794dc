"""The body of one request, which may take its time but not for ever."""

import time
from collections.abc import Iterator
from typing import Any


class TimedBody:
    """gunicorn's request body, with a limit on the time that reading it takes in all.

    A read of gunicorn's returns when it has all it wants, and a client may send one byte every few
    seconds. So the worker looks at `waking` (connection -> moment on the clock of time.monotonic)
    in every round of its loop, and ends the input of those whose moment has come.
    """

    def __init__(self, body: Any, connection: Any, waking: dict[Any, float], seconds: float):
        self._body = body
        self._connection = connection
        self._waking = waking
        self._left_s = seconds

    @property
    def failed(self) -> bool:
        """gunicorn's: where the next request begins is unknown, so the connection is closed."""
        return self._left_s <= 0 or bool(getattr(self._body, "failed", False))

    def read(self, size: int | None = None) -> bytes:
        """As the body's own. Raises TimeoutError when the time is used up."""
        return bytes(self._timed(self._body.read, size))

    def readline(self, size: int | None = None) -> bytes:
        return bytes(self._timed(self._body.readline, size))

    def readlines(self, size: int | None = None) -> list[bytes]:
        return list(self._timed(self._body.readlines, size))

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line

    def _timed(self, read: Any, size: int | None) -> Any:
        if self._left_s <= 0:
            raise TimeoutError
        began = time.monotonic()
        self._waking[self._connection] = began + self._left_s
        try:
            return read(size)
        finally:
            self._waking.pop(self._connection, None)
            self._left_s -= time.monotonic() - began
            if self._left_s <= 0:
                # Also instead of what gunicorn makes of an input that ends in the wrong place.
                raise TimeoutError
