"""F22: the main device of a map that names devices is chosen by chance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.testing.self_test.maps import NAMES
from service.testing.self_test.maps import NUMBERS
from service.testing.self_test.maps import ONE_CARD
from service.testing.self_test.maps import TWO_CARDS
from service.testing.self_test.maps import card_too_small
from service.testing.self_test.maps import cards_of_two_thirds
from service.testing.self_test.maps import main_devices
from tests.support.placing import planned
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


def test_plain_the_main_device_of_a_map_with_names_follows_a_hash() -> None:
    """Fails when `dispatch_model` takes the first device of the map instead of one of a set."""
    assert main_devices(NAMES) != [first for first, _ in NAMES]


def test_plain_a_set_of_names_begins_differently_from_start_to_start() -> None:
    """Python's own rule, and what `dispatch_model` takes the first of."""
    found = set()
    for seed in range(8):
        code = "print(list({'cuda:0', 'cuda:1'})[0])"
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        found.add(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True))
    assert found == {"cuda:0\n", "cuda:1\n"}


def test_numbers_make_it_the_first_device() -> None:
    """What our maps rely on."""
    assert main_devices(NUMBERS) == [first for first, _ in NUMBERS]


def test_our_maps_number_accelerators(folder: Path) -> None:
    limits = cards_of_two_thirds(folder)
    placement = planned(folder, "auto-shard", TWO_CARDS, max_memory=limits)
    assert placement.devices == ("cuda:0", "cuda:1")
    assert placement.main_device == "cuda:0"
    assert set(placement.load_kwargs["device_map"].values()) == {0, 1}
    assert set(placement.module_map.values()) == {"cuda:0", "cuda:1"}


def test_our_maps_number_accelerators_beside_the_cpu(folder: Path) -> None:
    small = card_too_small(folder)
    placement = planned(folder, "auto-shard", ONE_CARD, max_memory=small, on_no_fit="offload-cpu")
    assert set(placement.load_kwargs["device_map"].values()) == {0, "cpu"}


def test_single_gpu_numbers_its_device(folder: Path) -> None:
    placement = planned(folder, "single-gpu", TWO_CARDS, options={"device": 1})
    assert placement.load_kwargs["device_map"] == {"": 1}
    assert (placement.devices, placement.main_device) == (("cuda:1",), "cuda:1")
