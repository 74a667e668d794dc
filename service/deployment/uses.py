"""Requests that are at work with one model: it is let go when there are none."""

import threading
import time
from collections.abc import Callable


class Uses:
    """A count of requests, and since when there are none. Any thread. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._count = 0
        self._closed = False
        self._free_since = clock()

    @property
    def count(self) -> int:
        return self._count

    def enter(self) -> bool:
        """One more request. False when the model is being let go: ask for the one that follows."""
        with self._changed:
            if self._closed:
                return False
            self._count += 1
            return True

    def leave(self) -> None:
        """A request that entered has ended."""
        with self._changed:
            self._count -= 1
            self._free_since = self._clock()
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody enters from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close_if_free(self, seconds: float) -> bool:
        """`close`, if nobody has been here for that long. Returns whether it is closed now."""
        with self._changed:
            if self._count or self._clock() - self._free_since < seconds:
                return False
            self._closed = True
            self._changed.notify_all()
            return True

    def wait_free(self, timeout_s: float) -> bool:
        """Wait until nobody is here. Returns whether that came true within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._count, timeout_s)

    def wait_idle(self, seconds: Callable[[], float]) -> bool:
        """Wait until nobody has been here for `seconds()`; 0 is never, and is asked for again
        after `look_again`. Returns False when it was closed instead.
        """
        with self._changed:
            while not self._closed:
                limit = seconds()
                if self._count or limit <= 0:
                    self._changed.wait()
                    continue
                left = self._free_since + limit - self._clock()
                if left <= 0:
                    return True
                self._changed.wait(left)
            return False

    def look_again(self) -> None:
        """What `wait_idle` waits for may have changed."""
        with self._changed:
            self._changed.notify_all()
