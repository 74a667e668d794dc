"""Why a module is where it is, and what would move it."""

from dataclasses import replace
from pathlib import Path

import pytest

from service.placement import registry
from service.placement.plan import device_of
from service.placement.why import Reason
from service.placement.why import explain_module
from service.placement.why import reason
from tests.support.planned import LLAMA_70B
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.planned import write_shape

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape(tmp_path_factory.mktemp("big"), "llama", **LLAMA_70B)


def explained(folder: Path, name: str, hardware, **keys) -> Reason:
    strategy = registry.build().select("auto-shard")
    keys = {"strategy": "auto-shard", "max_context": 8192, "max_sequences": 2, **keys}
    config = model_config(folder, **keys)
    placement = strategy.plan(config, hardware)
    reason = explain_module(name, config, strategy, hardware, placement)
    for flag, device in reason.moves:  # what is said to move it does
        key, _, value = flag.removeprefix("--set ").partition("=")
        changed = config.model_copy(update={key: int(value) if value.isdigit() else value})
        moved = strategy.plan(changed, hardware)
        assert device_of(reason.unit.name, moved.module_map) == device != reason.device
    return reason


def test_a_layer_is_explained_by_its_neighbours_and_the_room_left(folder: Path):
    two = cards(24 * GIB, 24 * GIB)
    reason = explained(folder, "model.layers.41.mlp.down_proj", two, quantize="nf4")
    assert reason.unit.name == "model.layers.41"
    assert reason.device == "cuda:1"
    # 2 x 8192 tokens of 4 KiB, and a scratch page
    assert "64.2 MiB of KV cache" in reason.sentences[0]
    assert "from model.layers.40 to lm_head" in reason.sentences[1]


def test_an_offloaded_layer_is_explained_by_what_is_full(folder: Path):
    machine = cards(80 * GIB, ram=256 * GIB)
    reason = explained(folder, "model.layers.79", machine, on_no_fit="offload-cpu")
    assert reason.device == "cpu"
    assert "it rests on cpu because cuda:0" in reason.sentences[1]
    assert "it runs on cuda:0" in reason.sentences[1]
    assert ("--set quantize=nf4", "cuda:0") in reason.moves


def test_where_one_device_computes_there_is_nothing_to_explain(folder: Path):
    reason = explained(folder, "lm_head", ram(512 * GIB))
    assert reason.sentences[1] == "it is on cpu because nothing else computes in this plan"
    assert reason.moves == ()


def test_an_unknown_module_is_refused_with_a_suggestion(folder: Path):
    with pytest.raises(ValueError, match=r"no module model\.layer\.3; did you mean 'model\.layers"):
        explained(folder, "model.layer.3", ram(512 * GIB))


def test_a_device_of_which_the_plan_says_nothing_is_no_obstacle(folder: Path):
    """A strategy of one's own may name a main device and give no numbers for it."""
    two = cards(24 * GIB, 24 * GIB)
    config = model_config(folder, strategy="auto-shard", quantize="nf4", max_context=8192)
    plan = registry.build().select("auto-shard").plan(config, two)
    memory = {device: plan.memory[device] for device in plan.memory if device != plan.main_device}
    assert "cuda:1" in reason("cuda:1", two, replace(plan, memory=memory))
