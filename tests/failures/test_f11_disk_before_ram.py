"""F11: `max_memory` without "cpu" means no RAM at all: what the card cannot hold goes to disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
from accelerate.utils import get_max_memory
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import infer_auto_device_map

from service.errors import DoesNotFit
from service.placement.hardware import Hardware
from service.placement.hardware import invent
from service.testing.self_test.maps import GPU_OF_150_KB
from service.testing.self_test.maps import ONE_CARD
from service.testing.self_test.maps import card_too_small
from tests.support.placing import planned
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


def test_plain_max_memory_without_cpu_means_no_ram() -> None:
    """Fails when accelerate adds RAM to a max_memory that does not mention it."""
    assert "cpu" not in get_max_memory(dict(GPU_OF_150_KB))


@pytest.mark.parametrize("infer", [accelerate.infer_auto_device_map, infer_auto_device_map])
def test_plain_what_the_card_cannot_hold_goes_to_disk_past_all_the_ram(
    folder: Path, infer: Callable[..., dict[str, Any]]
) -> None:
    """Fails as the one above. Both planners: accelerate's own and transformers'."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    places = infer(model, max_memory=dict(GPU_OF_150_KB))
    assert set(places.values()) == {0, "disk"}
    assert places["model.layers.3"] == "disk"


def test_ours_fills_ram_before_the_disk_and_says_how_much_and_how_slow(folder: Path) -> None:
    plan = planned(
        folder, "auto-shard", ONE_CARD, on_no_fit="offload-disk", max_memory=card_too_small(folder)
    )
    assert plan.devices == ("cuda:0", "cpu")
    assert "disk" not in plan.module_map.values()
    [note] = [note for note in plan.notes if "rest on" in note]
    assert "rest on cpu" in note
    assert "s a token more" in note


def test_ours_uses_the_disk_only_for_what_ram_cannot_hold(folder: Path) -> None:
    layer = max(unit.weights for unit in planned(folder).units if unit.kv)
    limits = {**card_too_small(folder, 3 * layer), "cpu": layer + layer // 2}
    plan = planned(folder, "auto-shard", ONE_CARD, on_no_fit="offload-disk", max_memory=limits)
    assert plan.devices == ("cuda:0", "cpu", "disk")
    assert list(plan.module_map.values()).count("cpu") == 1


@pytest.mark.parametrize("machine", [ONE_CARD, invent("24GiB,ram=64GiB")])
def test_ours_never_uses_the_disk_unless_that_is_allowed(folder: Path, machine: Hardware) -> None:
    limits = {**card_too_small(folder), "cpu": 1000}
    for choice in ("refuse", "offload-cpu"):
        with pytest.raises(DoesNotFit, match="F20") as caught:
            planned(folder, "auto-shard", machine, on_no_fit=choice, max_memory=limits)
        assert caught.value.hint is not None
