"""One change of the model at a time: the first load, a reload, unloading, waking."""

import threading
from datetime import UTC
from datetime import datetime

from service.errors import ControlFailed


class Turn:
    """Whose turn it is. Any thread; a turn may be given back by another thread than took it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._what: str | None = None
        self._since = ""

    def take(self, what: str) -> None:
        """Begin. Raises ControlFailed naming what is under way instead, and since when."""
        if not self.try_take(what):
            raise ControlFailed(
                f"{self._what} is running since {self._since}",
                hint="wait for its end; GET /placement has its state",
            )

    def try_take(self, what: str) -> bool:
        """Begin, if nothing is under way."""
        with self._changed:
            if self._what is not None:
                return False
            self._begin(what)
            return True

    def wait(self, what: str) -> None:
        """Begin as soon as nothing is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._what is None)
            self._begin(what)

    def give(self) -> None:
        """It is done."""
        with self._changed:
            self._what = None
            self._changed.notify_all()

    def _begin(self, what: str) -> None:
        self._what = what
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
