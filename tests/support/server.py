"""A real Moorage server under gunicorn on a free port of 127.0.0.1, always ended."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.support.dying import end
from tests.support.dying import with_parent

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 180.0
"""Of anything that is waited for. Reached only when something is broken."""
MOORAGE = (sys.executable, "-m", "service.cli", "serve")
GUNICORN = (sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"))


def environment(**extra: str) -> dict[str, str]:
    """The test's environment without Moorage's own variables, plus `extra`."""
    own = {"DEVICE_MAP", "QUANTIZE", "MOORAGE_CACHE"}
    kept = {
        key: value
        for key, value in os.environ.items()
        if not (key.startswith("MOORAGE_") or key in own) or key == "MOORAGE_CACHE"
    }
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}


@dataclass
class Server:
    """A running server: its process (the gunicorn master), its log, and its address once known."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def url(self, timeout_s: float = LIMIT_S) -> str:
        """http://127.0.0.1:PORT as soon as it listens."""
        found = _wait(lambda: re.search(r"Listening at: (http://\S+)", self.text), self, timeout_s)
        return str(found[1])

    def curl(self, timeout_s: float = LIMIT_S) -> list[str]:
        """The command of the ready line, which is written just after readiness."""
        found = _wait(lambda: re.search(r"try: (curl .*)\n", self.text), self, timeout_s)
        return [*shlex.split(found[1]), "--silent"]

    def wait_ready(self, timeout_s: float = LIMIT_S) -> str:
        """Wait for readiness and return the address."""
        url = self.url()
        _wait(lambda: _get(f"{url}/health/ready").status_code == 200, self, timeout_s)
        return url

    def wait_exit(self, timeout_s: float = LIMIT_S) -> int:
        return self.process.wait(timeout_s)

    def post(self, path: str, body: Mapping[str, Any], **kwargs: Any) -> requests.Response:
        return requests.post(f"{self.url()}{path}", json=body, timeout=LIMIT_S, **kwargs)

    def placement(self) -> dict[str, Any]:
        document: dict[str, Any] = _get(f"{self.url()}/placement").json()
        return document

    def chat(self, text: str, **fields: Any) -> str:
        """The answer to one user message at temperature 0."""
        body = {
            "model": self.placement()["model"]["id"],
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            **fields,
        }
        response = self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])


@contextlib.contextmanager
def running(
    folder: Path, *arguments: str, command: tuple[str, ...] = MOORAGE, **extra: str
) -> Iterator[Server]:
    """Start a server in `folder`, its log in server.log there. Ended with SIGTERM, then harder."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            with_parent(os.getpid(), *command, *arguments),
            cwd=folder,
            env=environment(MOORAGE_BIND="127.0.0.1:0", **extra),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, log)
    try:
        yield server
    except BaseException:
        sys.stderr.write(server.text[-6000:])
        raise
    finally:
        end(process)
        process.wait(10)


def events(response: requests.Response) -> list[dict[str, Any]]:
    """The JSON events of an SSE response, which must end with [DONE]."""
    data = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def _get(url: str) -> requests.Response:
    return requests.get(url, timeout=LIMIT_S)


def _wait(probe: Any, server: Server, timeout_s: float) -> Any:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(requests.RequestException):
            found = probe()
            if found:
                return found
        if server.process.poll() is not None:
            raise AssertionError(
                f"the server ended with {server.process.returncode}:\n{server.text}"
            )
        time.sleep(0.05)
    raise AssertionError(f"nothing after {timeout_s} s; the log:\n{server.text}")
