"""How far something is, as one line at the bottom of a terminal where others write lines, too.

Whoever else writes to that terminal begins with CLEAR, which wipes the bar; it is drawn again below
at its next turn. So two processes, like gunicorn's master and worker, need not know of each other.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import TextIO

from service.config.environment import process_environment

CLEAR = "\r\x1b[2K"
EVERY_S = 0.1
WIDEST_BAR = 40

Look = Callable[[], tuple[str, float] | None]
"""What is being done, and how much of it is behind us (0 to 1); None: nothing at the moment."""


def takes_bars(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal that can wipe a line."""
    if stream is None or stream.closed or not stream.isatty():
        return False
    return process_environment().get("TERM", "dumb") not in ("dumb", "unknown")


class Bar:
    """Drawn from a thread of its own. The cursor stays visible: a process that is killed must not
    leave a terminal without one.
    """

    def __init__(self, stream: TextIO, look: Look) -> None:
        from rich.console import Console

        plain = bool(process_environment().get("NO_COLOR"))
        self._console = Console(file=stream, color_system=None if plain else "auto")
        self._stream, self._look = stream, look
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._began = time.monotonic()
        threading.Thread(target=self._run, name="bar", daemon=True).start()

    @property
    def shown(self) -> bool:
        """Whether it has not been stopped."""
        return not self._ended.is_set()

    def stop(self) -> None:
        """Wipe it. Nothing is drawn once this has returned. May be repeated."""
        with self._lock:
            if self.shown:
                self._ended.set()
                self._write(lambda: None)

    def _run(self) -> None:
        while self.shown:
            with self._lock:
                if self.shown:
                    self._write(self._line)
            self._ended.wait(EVERY_S)

    def _write(self, line: Callable[[], None]) -> None:
        """In one piece, so that no line of others gets between. The terminal may be gone."""
        from rich.control import Control
        from rich.segment import ControlType

        wipe = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
        with contextlib.suppress(OSError, ValueError):
            if self._in_front():
                with self._console:
                    self._console.control(wipe)
                    line()

    def _line(self) -> None:
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        now = self._look()
        if now is None:
            return
        what, share = now
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        figures = f" {share:4.0%} {minutes}:{seconds:02}  "
        room = self._console.width - 1  # a full line would wrap
        width = min(WIDEST_BAR, room // 3)
        self._console.print(ProgressBar(total=1.0, completed=share, width=width), end="")
        text = Text(figures + what)
        text.truncate(max(1, room - width), overflow="ellipsis")
        self._console.print(text, end="", soft_wrap=True)

    def _in_front(self) -> bool:
        """Not in the background of a shell, whose prompt is on that line."""
        try:
            return os.tcgetpgrp(self._stream.fileno()) == os.getpgrp()
        except OSError:  # not the terminal that controls us: there is no such thing
            return True
