"""Simulations that do not each import torch and transformers."""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from service.testing import simulation


@pytest.fixture(scope="session")
def forking() -> ForkServerContext:
    """Processes that begin as one that has imported the simulation, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.testing.simulated"])
    return context


@pytest.fixture
def forked_simulations(
    forking: ForkServerContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each simulation still has a process of its own. How it is started in earnest is tested by
    test_simulated.py.
    """

    def run(asked: str) -> "subprocess.CompletedProcess[str]":
        names = [tmp_path / f"simulation.{name}" for name in ("in", "out", "err")]
        names[0].write_text(asked)
        process = forking.Process(target=answer, args=(*map(str, names),))
        process.start()
        process.join(simulation.TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired("simulated", simulation.TIMEOUT_S)
        said = [name.read_text() if name.exists() else "" for name in names[1:]]
        return subprocess.CompletedProcess("simulated", process.exitcode, *said)

    monkeypatch.setattr(simulation, "_process", run)


def answer(requests: str, answers: str, errors: str) -> None:
    """In the process: `simulated.main` with these files for its pipes."""
    from service.testing import simulated

    os.dup2(os.open(requests, os.O_RDONLY), 0)
    os.dup2(os.open(answers, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has closed it
    simulated.main()
