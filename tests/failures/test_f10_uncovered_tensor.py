"""F9 and F10: a device map whose keys match too much or too little."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import expand_device_map

from service.errors import PlacementMismatch
from service.placement.certificate import certify
from service.placement.plan import device_of
from tests.support.placing import IDS
from tests.support.placing import bring_up
from tests.support.placing import built_in
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny

WITHOUT_THE_LAST_LAYER = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False)


def test_plain_transformers_takes_an_incomplete_map_in_silence(folder: Path) -> None:
    """Fails when `from_pretrained` checks that a map covers the model on one device too."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=WITHOUT_THE_LAST_LAYER)
    assert logits(model).shape[:2] == IDS.shape


def test_plain_accelerate_warns_of_a_typo_and_dies_without_naming_it(folder: Path) -> None:
    """Fails when a map's unknown key is refused, or the error names it."""
    typo = {"": "cpu", "model.embed_token": "disk"}
    with (
        pytest.warns(UserWarning, match="do not match any submodules"),
        pytest.raises(ValueError, match="weight is on the meta device, we need a `value`"),
    ):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map=typo, offload_folder=folder.parent / "offload"
        )


def test_plain_a_key_takes_other_layers_whose_number_begins_alike() -> None:
    """F9. Fails when `expand_device_map` matches whole names."""
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(12)]
    found = expand_device_map({"": "cpu", "model.layers.1": "disk"}, names)
    assert [n for n in names if found[n] == "disk"] == [names[1], names[10], names[11]]


def test_ours_matches_whole_names() -> None:
    places = {"": "cpu", "model.layers.1": "disk"}
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(12)]
    assert [n for n in names if device_of(n, places) == "disk"] == [names[1]]


def planning(module_map: dict[str, str], **changes: Any) -> Any:
    def plan(config: Any, hardware: Any) -> Any:
        placement = built_in().select("cpu").plan(config, hardware)
        return replace(placement, module_map=module_map, **changes)

    return plan


def test_ours_refuses_a_map_that_leaves_a_tensor_out_and_names_it(folder: Path) -> None:
    strategy = variant(plan=planning(WITHOUT_THE_LAST_LAYER))
    error = refusal(certify(bring_up(folder, strategy)))
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F10"
    assert error.tensors == ("model.layers.1.self_attn.q_proj.weight",)
    assert "is in no entry of the plan's module map (F10)" in error.message
    assert error.hint == 'add its module, or "" for everything else'


def test_ours_refuses_a_load_that_did_not_follow_its_map(folder: Path) -> None:
    """As F9 would make it: the map sends one layer away and the load two, or none."""
    places = {"": "cpu", "model.layers.1": "disk"}
    strategy = variant(plan=planning(places, devices=("cpu", "disk"), allows={"offload"}))
    error = refusal(certify(bring_up(folder, strategy)))
    assert error.message == (
        "model.layers.1.self_attn.q_proj.weight is on cpu, planned on disk and 8 more"
    )
    assert len(error.tensors) == 9


def test_a_deep_model_with_a_map_of_ours_is_where_the_map_says(tmp_path: Path) -> None:
    """Layers 1 and 10 on different devices, which a prefix match would mix up."""
    from tests.support.placing import offloaded

    folder = save_tiny(tmp_path / "deep", "llama", tie=False, layers=12)
    loaded = offloaded(folder, layers=2)
    places = loaded.placement.module_map
    assert (places["model.layers.1"], places["model.layers.10"]) == ("cpu", "disk")
    assert certify(loaded).valid
    away = {n.split(".")[2] for n, p in loaded.model.named_parameters() if p.is_meta}
    assert away == {"10", "11"}
