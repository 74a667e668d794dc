"""What every test runs with."""

import gc
import os
from pathlib import Path

import pytest

from service.config.compute_threads import compute_environment

# Before torch is imported, here and in every process that a test starts: what a server sets for
# itself on two cores. Several test processes whose idle threads spin take twice as long.
for name, value in compute_environment(2).items():
    os.environ.setdefault(name, value)

TESTS = Path(__file__).parent
# Files of few tests that take long: first, so that no process waits for another's at the end.
LONG = tuple(TESTS / name for name in ("faults", "server", "e2e", "web/test_conformance.py"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(item.path.is_relative_to(path) for path in LONG))


def pytest_collection_finish() -> None:
    """What the test modules imported is no garbage: some 500,000 objects that every load of a
    model would otherwise look at several times, for its memory and to collect.
    """
    gc.collect()
    gc.freeze()
