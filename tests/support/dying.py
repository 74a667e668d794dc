"""Servers that tests start end with them, also when pytest itself is killed."""

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

# prctl(PR_SET_PDEATHSIG, SIGKILL), which lasts through exec; the workers notice on their own
_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("whoever started this has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def with_parent(parent: int, *command: str) -> tuple[str, ...]:
    """The command, killed when the thread that starts it ends. parent: its process."""
    if sys.platform != "linux":
        return command
    return (sys.executable, "-S", "-E", "-c", _WITH_PARENT, str(parent), *command)


def end(process: "subprocess.Popen[Any]") -> None:
    """End what leads a session with SIGTERM, then all of that session harder."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
