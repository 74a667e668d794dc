"""A real gunicorn on a free port, always ended."""

import contextlib
import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import Self
from typing import TypeVar

import psutil

from tests.support.dying import with_parent

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
CONF = "tests/server/gunicorn_conf.py"
LIMIT_S = 120.0
"""How long anything is waited for. Far from what it takes; reached only when something is broken.
"""


def wait_for(what: str, probe: Callable[[], T | None]) -> T:
    """The probe's first true answer."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited in vain: {what}")


class Server:
    """`python -m gunicorn -c CONF arguments...`, or another command."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        conf: str = CONF,
        command: tuple[str, ...] | None = None,
        cwd: Path = ROOT,
        **environment: str,
    ) -> None:
        self._log = log
        keep = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")
        env = {name: os.environ[name] for name in keep if name in os.environ}
        env |= {"PYTHONPATH": str(ROOT)} | environment
        self._open = contextlib.ExitStack()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                with_parent(os.getpid(), *(command or self._gunicorn(conf, *arguments))),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=env,
                start_new_session=True,
            )

    @staticmethod
    def _gunicorn(conf: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "gunicorn", "-c", conf, *arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()
        # Master and workers alike, also workers that have outlived their master.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if kind is not None:
            sys.stderr.write(self.log())

    # --- looking

    def log(self) -> str:
        return self._log.read_text()

    def logged(self, text: str) -> None:
        wait_for(f"{text!r} in the log\n{self.log()}", lambda: text in self.log())

    @functools.cached_property
    def port(self) -> int:
        def probe() -> int | None:
            found = re.search(r"Listening at: http://127.0.0.1:(\d+)", self.log())
            if found is None and self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{self.log()}")
            return int(found[1]) if found else None

        return wait_for("the port", probe)

    def workers(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def worker_pid(self) -> int:
        pid: int = self.get("/process").json["pid"]
        return pid

    def ready(self) -> "Server":
        wait_for("readiness", lambda: self.port and self.try_get("/ready") == 200)
        return self

    def exit_status(self) -> int:
        return self.process.wait(LIMIT_S)

    # --- asking

    def get(self, path: str, method: str = "GET", body: bytes | None = None) -> "Answer":
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            return Answer(connection.getresponse())

    def try_get(self, path: str) -> int | None:
        """The status, or None if the server does not answer."""
        try:
            return self.get(path).status
        except (OSError, http.client.HTTPException):
            return None

    def stream(self) -> http.client.HTTPResponse:
        """An open stream whose first event has been read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        self._open.callback(connection.close)
        connection.request("GET", "/stream")
        response = connection.getresponse()
        self._open.callback(response.close)
        assert response.readline() == b"data: first\n"
        assert response.readline() == b"\n"
        return response

    def send(self, data: bytes) -> socket.socket:
        """A connection that has sent these bytes and stays open."""
        connection = socket.create_connection(("127.0.0.1", self.port), LIMIT_S)
        self._open.callback(connection.close)
        connection.sendall(data)
        return connection

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        with response:
            self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)
