"""A model's chat template, rendered in a process of its own.

A template is a program from the model's folder. Jinja's sandbox keeps it from files and from the
interpreter, not from running for ever, from filling the memory, or from one operation that holds
the interpreter for minutes (`10 ** (10 ** 9)`), which would silence the whole server. So it runs
elsewhere, with little memory and little time, and without the server's environment.
"""

import atexit
import functools
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from typing import TYPE_CHECKING
from typing import Any

from service.config.environment import process_environment
from service.errors import InvalidRequest
from service.errors import Overloaded
from service.text import template_process
from service.text.template_process import LENGTH_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
RENDER_S = 10.0
"""One conversation may take so long, and wait so long for those before it."""
START_S = 60.0
MEMORY_BYTES = 512 * 2**20
TEXT_BYTES = 32 * 2**20
READ_BYTES = 2**16
OUT_OF_MEMORY = "MemoryError"
# What the process is told of the environment: where Python and its packages are, and the time zone.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH")


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    prompt: bool = True,
) -> str:
    """The text of a conversation by the model's own template. prompt: ready for an answer.

    Raises InvalidRequest when the template refuses the messages, fails, takes too long or makes
    too much of them; Overloaded when others keep it busy.
    """
    try:
        template = tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError as error:  # several templates, and none for this
        raise _fails("ValueError") from error
    return renderer().render(
        {
            "template": template,
            "messages": list(messages),
            "tools": list(tools),
            "prompt": prompt,
            "special": dict(tokenizer.special_tokens_map),
        }
    )


@functools.lru_cache(maxsize=1)
def renderer() -> "Renderer":
    """The one of this process; its own process is started when it is first asked."""
    made = Renderer()
    atexit.register(made.close)
    return made


class Renderer:
    """Renders one conversation at a time in another process. Any thread."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def start(self) -> None:
        """Start the process if there is none, without waiting for it."""
        with self._busy:
            self._start()

    def render(self, request: Mapping[str, Any]) -> str:
        """request: as `template_process` reads it. Raises InvalidRequest, Overloaded."""
        if not self._busy.acquire(timeout=RENDER_S):
            raise Overloaded("the chat template of this model is busy, try again", param="messages")
        try:
            answer = self._ask(json.dumps(request).encode())
        finally:
            self._busy.release()
        if "text" in answer:
            return str(answer["text"])
        if "refused" in answer:
            said = answer["refused"]
            message = f"the chat template of this model refuses the messages: {said}"
            raise InvalidRequest(message, param="messages")
        if "endless" in answer:
            message = "the chat template of this model makes too long a text of the messages"
            raise InvalidRequest(message, param="messages")
        # not what it says: that may be the client's words
        LOG.warning("chat template raised %s (line %d)", answer["failed"], answer.get("line", 0))
        raise _fails(answer["failed"])

    def close(self) -> None:
        """End the process, whatever it does. The next request starts another."""
        process, self._process, self._ready = self._process, None, False
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                _close(pipe)
            process.wait()

    # --- lock held

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            env = process_environment()
            # -P: the folder of the script has modules whose names others use, too.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    str(Path(template_process.__file__).resolve()),
                    str(MEMORY_BYTES),
                    str(TEXT_BYTES),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: env[name] for name in PASSED_ON if name in env},
            )
        return self._process

    def _ask(self, request: bytes) -> dict[str, Any]:
        """Its answer; a process that does not give one in time is ended."""
        try:
            process = self._start()
            if process.stdin is None or process.stdout is None:
                raise EOFError
            if not self._ready:
                _read(process.stdout, time.monotonic() + START_S)
                self._ready = True
            process.stdin.write(len(request).to_bytes(LENGTH_BYTES, "big") + request)
            process.stdin.flush()
            answer = _read(process.stdout, time.monotonic() + RENDER_S)
        except TimeoutError:
            self.close()
            return {"failed": f"it took longer than {RENDER_S:g} s"}
        except (EOFError, OSError):  # ended by its limits, or by the kernel for want of memory
            self.close()
            return {"failed": OUT_OF_MEMORY}
        found: dict[str, Any] = json.loads(answer)
        if found.get("failed") == OUT_OF_MEMORY:
            self.close()  # a fresh process has its memory in order
        return found


def _fails(how: str) -> InvalidRequest:
    message = f"the chat template of this model fails on the messages: {how}"
    return InvalidRequest(message, param="messages")


def _read(pipe: IO[bytes], until: float) -> bytes:
    """One frame. Raises TimeoutError, EOFError."""
    length = int.from_bytes(_bytes(pipe, LENGTH_BYTES, until), "big")
    if length > 6 * TEXT_BYTES + READ_BYTES:  # JSON writes a character in six at most
        raise EOFError
    return _bytes(pipe, length, until)


def _bytes(pipe: IO[bytes], count: int, until: float) -> bytes:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    found = bytearray()
    while len(found) < count:
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(pipe.fileno(), min(count - len(found), READ_BYTES))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:  # what it was sent last did not arrive
        pass
