"""Every test here leaves the process as it found it, or says so."""

from collections.abc import Iterator

import pytest
import torch

from service.placement import guard


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Loader globals are pristine before a test and, whatever it did, after it."""
    assert guard.findings() == []
    yield
    guard.heal()


@pytest.fixture(autouse=True, scope="package")
def one_compute_thread() -> Iterator[None]:
    """Tiny products are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
