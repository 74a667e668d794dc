"""What is to go wrong in the worker, written by a test and read there: one small JSON file.

forward, place_inputs: what happens in a step that computes a position of `at` (from, to): "raise",
"memory", "nan", "hold", "leave", or for place_inputs "nothing", "list", "shape". A position is a
token's place in its sequence, so short sequences stay clear of it. step_s: seconds added to every
step. decode: "raise" for texts with the token `FAULTY_TOKEN`. clock_s: added to time.time().
hangs_after_s: what "hold" may take before it is taken to hang.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FAULTY_TOKEN = 7
"""The byte of the bell, which no prompt of a test has."""
FAULTY_TEXT = "\N{BELL}"
"""The tokenizer raises for it."""
REFUSED_TEXT = "the template refuses this"
BROKEN_TEXT = "the template breaks on this"
SECRET = "/srv/secret/weights.bin"
"""In the message of everything that is raised; must reach no client."""
LATE = (250, 10_000)
"""Positions that only a long sequence has."""
ALL = (0, 10_000)
POLL_S = 0.002


class Control:
    """The file, from either side."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.always: dict[str, Any] = {}
        self._seen: tuple[int, int] | None = None
        self._values: dict[str, Any] = {}

    @classmethod
    def of(cls, folder: Path) -> "Control":
        """That of the server which runs in this folder."""
        return cls(folder / "control.json")

    def write(self, **values: Any) -> None:
        """What goes wrong from now on, beside `always`; nothing else does."""
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.always | values))
        os.replace(new, self._path)

    @contextmanager
    def during(self, **values: Any) -> Iterator[None]:
        """The fault for the time of the block."""
        self.write(**values)
        try:
            yield
        finally:
            self.write()

    def read(self) -> dict[str, Any]:
        """Cheap while the file does not change: every step reads it."""
        try:
            stat = self._path.stat()
            if self._seen != (stat.st_ino, stat.st_mtime_ns):
                self._values = json.loads(self._path.read_text())
                self._seen = (stat.st_ino, stat.st_mtime_ns)
        except FileNotFoundError:
            return {}
        return self._values

    def due(self, place: str, positions: list[int]) -> str | None:
        """What this step is to do at `place`."""
        fault: dict[str, Any] = self.read().get(place) or {}
        first, last = fault.get("at", ALL)
        return fault.get("do") if any(first <= p < last for p in positions) else None

    def hold(self, place: str) -> None:
        """Wait until the test says something else."""
        while (self.read().get(place) or {}).get("do") == "hold":
            time.sleep(POLL_S)
