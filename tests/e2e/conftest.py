"""The real model, fetched once per machine as a user would, and one server to ask."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.server import ROOT
from tests.support.server import Server
from tests.support.server import environment
from tests.support.server import running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "e2e":
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session", autouse=True)
def fetched() -> None:
    command = [sys.executable, "-m", "service.cli", "model", "fetch", "smollm2-135m"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`moorage serve` with no config at all, ready."""
    with running(tmp_path_factory.mktemp("serve")) as running_server:
        running_server.wait_ready()
        yield running_server
