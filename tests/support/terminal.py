"""A command on a terminal of its own, and what is left on the screen."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path

from tests.support.dying import end
from tests.support.dying import with_parent
from tests.support.server import environment

MOORAGE = (sys.executable, "-m", "service.cli")
# of a new session, the first terminal that is opened is the one that Ctrl-C comes from
ON_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # who runs the tests may have it ignored
_, terminal, errors, *command = sys.argv
for number, path in enumerate((terminal, terminal, errors)):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
os.execvp(command[0], command)
"""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WIPED = "\x1b[2K"


class Terminal:
    """The process and what it has written. Read by a thread, so that it never has to wait."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int, slave: int) -> None:
        """slave: held open, or the master would see an end before the command has opened it."""
        self.process = process
        self._master, self._slave = master, slave
        self._data = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the last process on the terminal has ended
            while data := os.read(self._master, 65536):
                self._data += data

    @property
    def raw(self) -> str:
        return self._data.decode(errors="replace")

    @property
    def screen(self) -> list[str]:
        """The lines a person sees: without colours, and without what was wiped."""
        lines = (line.rpartition(WIPED)[2] for line in self.raw.split("\n"))
        return [ESCAPE.sub("", line).replace("\r", "").rstrip() for line in lines]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, *, after: int = 0, timeout_s: float = 180) -> int:
        """Wait until `text` is in `raw[after:]`; where it ends."""
        end = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None
            if ended:
                self.wait()
            if (found := self.raw.find(text, after)) >= 0:
                return found + len(text)
            if ended or time.monotonic() > end:
                raise AssertionError(f"no {text!r} in {self.raw[after:]!r}")
            time.sleep(0.02)

    def wait(self, timeout_s: float = 120) -> int:
        """The exit status, when everything it wrote has been read."""
        status = self.process.wait(timeout_s)
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1
        self._reader.join(timeout_s)
        return status


@contextlib.contextmanager
def on_terminal(
    *words: str,
    columns: int = 80,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    errors: Path | None = None,
) -> Iterator[Terminal]:
    """Run `moorage` with these words on a terminal; ended with SIGTERM, then harder.

    errors: where stderr goes instead.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    own = {"TERM": "xterm-256color", "PYTHONWARNINGS": "ignore", **(env or {})}
    kept = {k: v for k, v in environment(**own).items() if k not in ("NO_COLOR", "COLUMNS")}
    name = os.ttyname(slave)
    process = subprocess.Popen(
        with_parent(
            os.getpid(),
            sys.executable,
            "-c",
            ON_TERMINAL,
            name,
            str(errors or name),
            *MOORAGE,
            *words,
        ),
        cwd=cwd,
        env={**kept, **(env or {})},
        start_new_session=True,
    )
    terminal = Terminal(process, master, slave)
    try:
        yield terminal
    finally:
        end(process)
        terminal.wait(10)
        os.close(master)
