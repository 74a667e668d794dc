"""One server for all faults that it is to survive, and the proof that it has."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.serving import COMPLETIONS
from tests.faults.serving import QUIET
from tests.faults.serving import QUIET_TOKENS
from tests.faults.serving import Faulty
from tests.faults.serving import completion
from tests.faults.serving import save_model
from tests.faults.serving import text_of

PACE_S = 0.02


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Faulty]:
    """Survives every fault that a test brings over it."""
    with Faulty(tmp_path_factory.mktemp("faulty"), model) as server:
        yield server.ready()
        told = [line for line in server.lines() if "is ready" in line["message"]]
        assert len(told) == 1, "the worker was replaced"


@pytest.fixture(scope="session")
def quiet(shared: Faulty) -> str:
    """What the neighbour says when it is alone."""
    answer = shared.ask(COMPLETIONS, completion(QUIET, QUIET_TOKENS))
    text: str = answer.json["choices"][0]["text"]
    return text


@pytest.fixture(scope="session")
def idle(shared: Faulty, quiet: str) -> tuple[int, int]:
    """Threads and files of the server when it has nothing to do, but has had: libraries start
    threads of their own with the first text.
    """
    shared.wait_idle(10_000, 10_000)
    return shared.held()


@pytest.fixture
def server(shared: Faulty, idle: tuple[int, int], quiet: str) -> Iterator[Faulty]:
    """The shared server, with a neighbour who is served through the whole test and gets what it
    gets alone. Afterwards nothing is in use.
    """
    shared.control.always = {"step_s": PACE_S}
    shared.control.write()
    neighbour = shared.stream(QUIET, QUIET_TOKENS)
    with contextlib.closing(neighbour):
        events = neighbour.events()
        first = next(events)
        yield shared
        shared.control.always = {}
        shared.control.write()
        assert text_of([first, *events]) == quiet
        assert neighbour.done
    shared.wait_idle(*idle)
