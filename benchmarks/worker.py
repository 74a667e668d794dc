"""A process that holds one engine and answers what it is asked, a line of JSON each way.

    python -m benchmarks.worker NAME FOLDER CONTEXT STREAMS

First it says {"ready_s", "detail"}, or {"absent": why} and ends. Then, for every
{"requests", "streams", "beside"} on stdin, {"answers", "beside"} or {"error"}; at the end of stdin
it ends. Requests under "beside" are sent one by one once the others, then all at once, are running.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import TextIO

from benchmarks.loops import beside
from benchmarks.peers import Absent
from benchmarks.peers import make
from benchmarks.workload import Request
from service.cli.timing import Answer

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str]) -> int:
    """Serve until stdin ends."""
    name, folder, context, streams = arguments
    # libraries print to stdout, so the protocol gets a descriptor of its own
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began = time.perf_counter()
    try:
        peer = make(name, Path(folder), context=int(context), streams=int(streams))
    except (Absent, ImportError) as error:
        _say(out, {"absent": str(error)})
        return 0
    _say(out, {"ready_s": time.perf_counter() - began, "detail": peer.detail})
    for line in sys.stdin:
        asked = json.loads(line)
        requests = [Request.of(document) for document in asked["requests"]]
        front = [Request.of(document) for document in asked["beside"]]
        try:
            if front:
                answers, found = beside(requests, front, peer.one)
            else:
                answers, found = peer.answer(requests, asked["streams"]), []
        except Exception as error:  # an engine may raise anything; the others are still measured
            traceback.print_exc()
            _say(out, {"error": f"{type(error).__name__}: {error}"})
        else:
            _say(out, {"answers": _plain(answers), "beside": _plain(found)})
    peer.close()
    return 0


def _plain(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [answer.as_dict() for answer in answers]


def _say(out: TextIO, document: Mapping[str, Any]) -> None:
    out.write(json.dumps(document) + "\n")
    out.flush()


def environment(threads: int) -> dict[str, str]:
    """Of every engine: this one's without Moorage's settings, and the same threads for all."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MOORAGE_")}
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {
        **kept,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


class Worker:
    """A worker seen from outside. Ended by `close`, which may be repeated."""

    def __init__(
        self, name: str, folder: Path, *, context: int, streams: int, python: str, threads: int
    ) -> None:
        """Start it and wait until it is ready. Raises Absent, RuntimeError if it ends otherwise.

        python: the interpreter that has the peer installed. threads: that compute.
        """
        self._process = subprocess.Popen(
            (python, "-m", "benchmarks.worker", name, str(folder), str(context), str(streams)),
            cwd=ROOT,
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            told = self._listen()
            if "absent" in told:
                raise Absent(told["absent"])
        except BaseException:
            self.close()
            raise
        self.ready_s: float = told["ready_s"]
        self.detail: dict[str, Any] = told["detail"]

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        """See `Peer.answer`. Raises RuntimeError with what it said."""
        return self._ask(requests, streams, [])[0]

    def beside(
        self, background: Sequence[Request], foreground: Sequence[Request]
    ) -> tuple[list[Answer], list[Answer]]:
        """See `loops.beside`; ours only. Raises RuntimeError with what it said."""
        return self._ask(background, len(background), foreground)

    def close(self) -> None:
        """Let it end, harder after 20 s."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(
        self, requests: Sequence[Request], streams: int, front: Sequence[Request]
    ) -> tuple[list[Answer], list[Answer]]:
        asked = {
            "requests": [request.as_dict() for request in requests],
            "streams": streams,
            "beside": [request.as_dict() for request in front],
        }
        if self._process.stdin is None:
            raise RuntimeError("this worker has no stdin")
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        told = self._listen()
        if "error" in told:
            raise RuntimeError(told["error"])
        return [Answer.of(a) for a in told["answers"]], [Answer.of(a) for a in told["beside"]]

    def _listen(self) -> dict[str, Any]:
        out = self._process.stdout
        line = "" if out is None else out.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self._process.wait()}")
        told: dict[str, Any] = json.loads(line)
        return told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
