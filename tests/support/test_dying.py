"""What a test starts does not outlive it."""

import subprocess
import sys

import psutil

from tests.support.dying import with_parent

STARTS = """
import os, subprocess, sys
from tests.support.dying import with_parent

child = subprocess.Popen(with_parent(os.getpid(), "sleep", "600"))
print(child.pid, flush=True)
child.wait()
"""


def test_it_is_killed_when_whoever_started_it_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([child], 60)
    assert alive == []


def test_it_does_not_start_when_they_are_gone_already() -> None:
    done = subprocess.run(with_parent(1, "echo", "started"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "whoever started this has ended" in done.stderr
