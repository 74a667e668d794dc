"""Layers that a map cuts open: planned part by part, and run on devices of their own."""

from pathlib import Path

import pytest

from service.errors import PlacementMismatch
from service.placement import footprint
from service.placement import loading
from service.placement import planning
from service.placement import registry
from service.placement.certificate import certify
from service.placement.plan import Placement
from service.placement.plan import groups
from service.placement.tensors import hooks_of
from service.testing import simulation
from service.testing.tiny import save_tiny
from tests.support.planned import GIB
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram

EXPERTS = [f"model.layers.{n}.mlp.experts" for n in range(4)]
LAYERS = [f"model.layers.{n}" for n in range(4)]


pytestmark = pytest.mark.usefixtures("forked_simulations")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("moe") / "m", "qwen3_moe", layers=4)


def planned(folder: Path, hardware, module_map) -> Placement:
    return planning.mapped(model_config(folder), hardware, module_map)


def test_a_map_may_name_a_module_inside_a_layer(folder: Path):
    machine = cards(24 * GIB, 24 * GIB)
    whole = planned(folder, machine, {"": "cuda:0"})
    split = planned(folder, machine, {"": "cuda:0", **dict.fromkeys(EXPERTS, "cuda:1")})
    on = {device: memory.weights for device, memory in split.memory.items()}
    assert on["cuda:1"] == 4 * 4 * (2 * 64 * 64 + 64 * 64) * 4  # layers, experts, numbers, bytes
    assert sum(on.values()) == whole.memory["cuda:0"].weights
    assert split.memory["cuda:0"].kv == whole.memory["cuda:0"].kv
    assert split.memory["cuda:1"].kv == 0
    assert split.allows == frozenset()


def test_the_kv_of_a_split_layer_goes_with_its_attention(folder: Path):
    attention = [f"{name}.self_attn" for name in LAYERS]
    machine = cards(24 * GIB, 24 * GIB)
    made = planned(folder, machine, {"": "cuda:0", **dict.fromkeys(attention, "cuda:1")})
    assert [unit.name for unit in made.units if unit.kv] == attention
    assert made.memory["cuda:0"].kv == 0


def test_layers_that_are_placed_as_a_whole_stay_whole(folder: Path):
    made = planned(folder, cards(24 * GIB), {"": "cuda:0", EXPERTS[2]: "cpu"})
    assert [unit.name for unit in made.units if unit.name in LAYERS] == [
        "model.layers.0",
        "model.layers.1",
        "model.layers.3",
    ]
    assert made.allows == {"offload"}
    assert "passing" in made.memory["cuda:0"].parts


def test_parts_are_shown_as_runs(folder: Path):
    machine = cards(24 * GIB, 24 * GIB)
    made = planned(folder, machine, {"": "cuda:0", **dict.fromkeys(EXPERTS, "cuda:1")})
    shown = {device: [run.name for run in found] for device, found in groups(made).items()}
    assert shown["cuda:1"] == ["model.layers.0-3.mlp.experts"]
    assert "model.layers.0-3.self_attn" in shown["cuda:0"]


def test_every_module_can_be_named(folder: Path):
    names = planning.modules(model_config(folder))
    assert set(EXPERTS) <= set(names)
    assert "" not in names


def test_a_tensor_is_no_module(folder: Path):
    with pytest.raises(PlacementMismatch, match=r"no module .*gate_up_proj to place"):
        planned(folder, cards(GIB), {"": "cuda:0", f"{EXPERTS[0]}.gate_up_proj": "cpu"})


def test_parts_on_other_cards_run_and_give_back_what_they_compute(folder: Path):
    strategy = registry.build().select("auto-shard")  # its place_inputs is the usual one
    machine = cards(24 * GIB, 24 * GIB, 24 * GIB)
    halves = dict(zip(LAYERS, ["cuda:0", "cuda:0", "cuda:1", "cuda:1"], strict=True))
    maps = [
        {"": "cuda:0", **dict.fromkeys(EXPERTS, "cuda:1")},
        {"": "cuda:0", **dict.fromkeys(EXPERTS, "cpu")},
        # layers over two cards, all experts on the third
        {"": "cuda:0", **halves, **dict.fromkeys(EXPERTS, "cuda:2")},
    ]
    jobs = [
        simulation.Job(model_config(folder), strategy, planned(folder, machine, one))
        for one in maps
    ]
    for made in simulation.simulate_all(jobs):
        assert made.status == "proven", made.message
        assert len(made.kv) == 4


def test_a_model_with_experts_on_disk_loads_and_is_proven(folder: Path):
    strategy = registry.build().select("auto-shard")
    placement = planned(folder, ram(GIB), {"": "cpu", **dict.fromkeys(EXPERTS, "disk")})
    loaded = loading.load(strategy, model_config(folder), placement, lambda share: None)
    assert certify(loaded).valid
    for name in EXPERTS:
        assert all(hook.io_same_device for hook in hooks_of(loaded.model.get_submodule(name)))


def test_a_footprint_has_the_same_bytes_however_it_is_cut(folder: Path):
    def bytes_of(apart: tuple[str, ...]) -> tuple[int, int]:
        found = footprint.measure(
            model_config(folder, quantize="int8"),
            on_cpu=True,
            native_bfloat16=True,
            apart=apart,
        )
        return found.weights, found.kv

    assert bytes_of(()) == bytes_of(("model.layers.1.self_attn.q_proj", EXPERTS[3]))
