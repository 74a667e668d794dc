"""F9: a device-map key takes other layers too, whose names begin like it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import expand_device_map

from service.placement import planning
from service.placement.certificate import certify
from service.placement.plan import Placement
from service.placement.plan import device_of
from service.testing.self_test.maps import BEGINS_ALIKE
from service.testing.self_test.maps import layers_away
from service.testing.self_test.maps import planned_by_names
from tests.support.placing import bring_up
from tests.support.placing import offloaded
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny

NAMES = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=12)


def test_plain_transformers_takes_other_layers_whose_number_begins_alike() -> None:
    """Fails when `expand_device_map` matches whole names."""
    found = expand_device_map(BEGINS_ALIKE, NAMES)
    assert [n for n in NAMES if found[n] == "disk"] == [NAMES[1], NAMES[10], NAMES[11]]


def test_plain_a_load_with_a_key_inside_of_another_dies_without_naming_it(folder: Path) -> None:
    """The same for every key inside of another. Fails when such a map is carried out, or refused by
    name.
    """
    with pytest.raises(ValueError, match="weight is on the meta device, we need a `value`") as dead:
        AutoModelForCausalLM.from_pretrained(
            folder, device_map=dict(BEGINS_ALIKE), offload_folder=folder.parent / "offload"
        )
    assert "model.layers.1" not in str(dead.value)


def test_ours_matches_whole_names() -> None:
    assert [n for n in NAMES if device_of(n, BEGINS_ALIKE) == "disk"] == [NAMES[1]]


def test_ours_carries_the_same_map_out_as_it_is_written(folder: Path) -> None:
    """accelerate gets an entry for every module."""

    def plan(config: Any, hardware: Any) -> Placement:
        return planning.mapped(config, hardware, BEGINS_ALIKE)

    loaded = bring_up(folder, variant(plan=plan))
    assert loaded.placement.load_kwargs["device_map"]["model.layers.10"] == "cpu"
    assert layers_away(loaded.model) == {1}
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()


def test_ours_refuses_a_load_that_did_not_follow_its_map(folder: Path) -> None:
    """The map sends one layer away and the load none, or three."""
    plan = planned_by_names(BEGINS_ALIKE, devices=("cpu", "disk"), allows={"offload"})
    error = refusal(certify(bring_up(folder, variant(plan=plan))))
    assert error.message == (
        "model.layers.1.self_attn.q_proj.weight is on cpu, planned on disk and 8 more"
    )
    assert len(error.tensors) == 9
    assert error.hint == "the load did not follow the plan; see moorage plan"


def test_a_deep_model_with_a_plan_of_ours_is_where_the_plan_says(folder: Path) -> None:
    """Layers 1 and 10 on different devices, which a prefix match would mix up."""
    loaded = offloaded(folder, layers=2)
    places = loaded.placement.module_map
    assert (places["model.layers.1"], places["model.layers.10"]) == ("cpu", "disk")
    assert certify(loaded).valid
    assert layers_away(loaded.model) == {10, 11}
