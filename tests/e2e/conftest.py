"""The real model, fetched once per machine as a user would, and one server to ask."""

from collections.abc import Iterator

import pytest

from tests.support.server import Server
from tests.support.server import running
from tests.support.with_tools import fetch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "e2e":
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session", autouse=True)
def fetched() -> None:
    fetch("smollm2-135m")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`moorage serve` with no config at all, ready."""
    with running(tmp_path_factory.mktemp("serve")) as running_server:
        running_server.wait_ready()
        yield running_server
