"""From a model and a machine to a placement, KV reserved first."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations.accelerate import expand_device_map

from service.errors import DoesNotFit
from service.errors import PlacementMismatch
from service.errors import PlacementUnavailable
from service.placement import footprint
from service.placement import hardware
from service.placement import planning
from service.placement import registry
from service.placement.kv import PAGE_TOKENS
from service.placement.overhead import CPU_KERNELS
from service.placement.overhead import FIXED
from service.placement.plan import Placement
from service.placement.plan import device_of
from service.placement.plan import groups
from tests.support.planned import GIB
from tests.support.planned import LLAMA_70B
from tests.support.planned import MIB
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.planned import write_shape
from tests.support.tiny import save_tiny


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape(tmp_path_factory.mktemp("shapes") / "llama-70b", **LLAMA_70B)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 layers, tied, 1.8 MB in float32."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama", layers=12, tie=True)


def rig(folder: Path, **changes: Any) -> Any:
    keys = {"strategy": "auto-shard", "max_context": 8192, "max_sequences": 2, "deployment": "rig"}
    return model_config(folder, **{**keys, **changes})


TWO_24 = hardware.invent("2x24GiB")
TWO_MIB = 2 * MIB + CPU_KERNELS


# --- 70B on two cards


def test_a_70b_model_in_nf4_takes_half_of_each_24_gib_card(llama_70b: Path):
    made = planning.spread(rig(llama_70b, quantize="nf4"), TWO_24)
    for device in ("cuda:0", "cuda:1"):
        assert round(made.memory[device].weights / GIB, 1) == 18.4
        assert round(made.memory[device].kv / GIB, 1) == 2.5
    assert [[g.name for g in groups(made)[d]] for d in made.devices] == [
        ["model.embed_tokens", "model.layers.0-39"],
        ["model.layers.40-79", "model.norm", "model.rotary_emb", "lm_head"],
    ]
    assert made.kv_bytes_per_token == 327_680
    assert made.kv_tokens == 16_384
    assert made.parameters == 70_553_706_496
    assert made.quantized == 80 * 7


def test_what_is_planned_is_within_what_is_free(llama_70b: Path):
    made = planning.spread(rig(llama_70b, quantize="nf4"), TWO_24)
    for gpu in TWO_24.gpus:
        assert made.memory[gpu.id].total <= gpu.free_bytes


def test_it_is_refused_unquantised_with_the_bytes_and_the_way_out(llama_70b: Path):
    with pytest.raises(DoesNotFit) as caught:
        planning.spread(rig(llama_70b), TWO_24)
    message, hint = caught.value.message, caught.value.hint or ""
    assert "131.4 GiB of weights and 5.0 GiB of KV cache" in message
    assert re.search(r"9\d\.\d GiB short \(F20\)", message)
    assert "quantize: nf4" in hint
    assert "moorage plan --deployment rig" in hint
    assert caught.value.failure_class == "F20"


def test_offload_fills_ram_before_disk_and_says_what_it_costs(llama_70b: Path):
    config = rig(llama_70b, on_no_fit="offload-disk")
    made = planning.spread(config, hardware.invent("2x24GiB,ram=64GiB"))
    assert made.devices == ("cuda:0", "cuda:1", "cpu", "disk")
    assert made.allows == {"offload"}
    layer = made.memory["cpu"].weights // len(made_on(made, "cpu"))
    assert 64 * GIB - made.memory["cpu"].weights < layer, "RAM is full"
    assert sum(m.weights for m in made.memory.values()) == 2 * made.parameters + 512
    assert any("rest on cpu" in note and "PCIe" in note for note in made.notes)
    assert any("rest on disk" in note for note in made.notes)
    assert made.memory["disk"].kv == made.memory["cpu"].kv == 0


def test_offload_to_ram_alone_is_refused_when_ram_is_too_small(llama_70b: Path):
    with pytest.raises(DoesNotFit):
        planning.spread(rig(llama_70b, on_no_fit="offload-cpu"), TWO_24)


def test_offloaded_layers_are_planned_to_run_on_the_main_device(llama_70b: Path):
    """Their KV is there, and the weights of one pass through."""
    config = rig(llama_70b, on_no_fit="offload-cpu")
    made = planning.spread(config, hardware.invent("2x24GiB,ram=200GiB"))
    kv = 327_680 * (16_384 + PAGE_TOKENS) // 80
    on_main = len(made_on(made, "cuda:0")) + len(made_on(made, "cpu"))
    assert made.main_device == "cuda:0"
    assert made.memory["cuda:0"].kv == on_main * kv
    layer = next(unit.weights for unit in made.units if unit.name == "model.layers.0")
    assert made.memory["cuda:0"].overhead - made.memory["cuda:1"].overhead == layer


def made_on(made: Placement, device: str) -> list[str]:
    """The layers on a device."""
    return [n for n, d in made.module_map.items() if d == device and ".layers." in n]


def test_quantised_weights_are_not_offloaded(llama_70b: Path):
    """bitsandbytes would leave offloaded layers unquantised (F13)."""
    config = rig(llama_70b, quantize="nf4", max_sequences=4, on_no_fit="offload-cpu")
    with pytest.raises(DoesNotFit, match="cannot be offloaded"):
        planning.spread(config, TWO_24)


# --- only the arguments count


def test_a_plan_depends_on_its_arguments_only(
    llama_70b: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def touched(*args: object, **kwargs: object) -> None:
        raise AssertionError("a plan for this machine would differ from one for another")

    config = rig(llama_70b, quantize="nf4", offload_folder=tmp_path / "offload")
    first = planning.spread(config, TWO_24)
    for name in ("is_available", "device_count", "mem_get_info", "current_device"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.chdir(tmp_path)
    before = sorted(llama_70b.iterdir())
    second = planning.spread(config, TWO_24)
    settings = [dict(plan.load_kwargs).pop("quantization_config") for plan in (first, second)]
    assert settings[0].to_dict() == settings[1].to_dict()
    without = [dataclasses.replace(plan, load_kwargs={}) for plan in (first, second)]
    assert without[0] == without[1]
    assert list(tmp_path.iterdir()) == []
    assert sorted(llama_70b.iterdir()) == before


def test_a_70b_plan_builds_one_skeleton(llama_70b: Path, monkeypatch: pytest.MonkeyPatch):
    built: list[object] = []
    build = transformers.AutoModelForCausalLM.from_config

    def counted(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        built.append({parameter.device.type for parameter in model.parameters()})
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", counted)
    planning.spread(rig(llama_70b, quantize="nf4"), TWO_24)
    assert built == [{"meta"}]


# --- one device


def test_one_device_holds_the_whole_model(tiny: Path):
    made = planning.on_one_device(model_config(tiny), ram(GIB), "cpu")
    measured = footprint.measure(model_config(tiny), on_cpu=True, native_bfloat16=True)
    assert made.module_map == {"": "cpu"}
    assert made.memory["cpu"].weights == measured.weights
    assert made.memory["cpu"].kv == measured.kv
    assert made.load_kwargs == {
        "dtype": "float32",
        "device_map": {"": "cpu"},
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    assert made.allows == frozenset()


def test_a_byte_less_than_planned_is_refused(tiny: Path):
    needed = planning.on_one_device(model_config(tiny), ram(GIB), "cpu").memory["cpu"].total
    needed -= CPU_KERNELS  # `ram` puts them on top
    assert planning.on_one_device(model_config(tiny), ram(needed), "cpu")
    with pytest.raises(DoesNotFit):
        planning.on_one_device(model_config(tiny), ram(needed - 1), "cpu")


def test_what_the_hint_says_would_fit_fits(tiny: Path):
    """ "it fits max_sequences 1 x max_context 512, or 4 x 256" """
    config = model_config(tiny, max_context=512, max_sequences=64)
    weights = planning.on_one_device(config, ram(GIB), "cpu").memory["cpu"].weights
    small = ram(weights + 30 * MIB)
    with pytest.raises(DoesNotFit) as caught:
        planning.on_one_device(config, small, "cpu")
    found = re.search(
        r"fits max_sequences (\d+) x max_context (\d+), or (\d+) x (\d+)", caught.value.hint or ""
    )
    assert found is not None, caught.value.hint
    numbers = [int(number) for number in found.groups()]
    for sequences, context in (numbers[:2], numbers[2:]):
        smaller = config.model_copy(update={"max_sequences": sequences, "max_context": context})
        assert planning.on_one_device(smaller, small, "cpu")


def test_a_device_that_is_not_there_is_named_with_those_that_are(tiny: Path):
    with pytest.raises(PlacementUnavailable, match=r"needs cuda:2.*cuda:0, cuda:1 only \(F19\)"):
        planning.on_one_device(model_config(tiny), cards(GIB, GIB), "cuda:2")
    with pytest.raises(PlacementUnavailable, match=r"there is no accelerator \(F19\)") as caught:
        planning.on_one_device(model_config(tiny), ram(GIB), "cuda:0")
    assert "strategy: cpu" in (caught.value.hint or "")


def test_the_models_own_context_is_the_limit_and_said(tiny: Path):
    made = planning.on_one_device(model_config(tiny, max_context=4096), ram(GIB), "cpu")
    assert made.context == 512
    assert made.notes == ("max_context is 512, the model's own limit; 4,096 was asked.",)


# --- what is left alone


def test_latent_attention_is_said_to_be_kept_expanded(tmp_path: Path):
    """128 heads x (128 + 64 + 128) numbers instead of 512 + 64: 71 times."""
    folder = write_shape(tmp_path, "deepseek_v3", dtype="bfloat16")
    made = planning.spread(rig(folder), hardware.invent("16x141GiB"))
    assert made.kv_bytes_per_token == 61 * 128 * 320 * 2
    assert any("71 times the latent vectors" in note for note in made.notes)


def test_a_budget_of_tokens_is_said_and_makes_room(tiny: Path):
    whole = planning.on_one_device(rig(tiny, max_sequences=8), cards(GIB), "cuda:0")
    budget = rig(tiny, max_sequences=8, kv_tokens=1024)
    on_card = planning.on_one_device(budget, cards(GIB), "cuda:0")
    assert on_card.kv_tokens == 1024
    assert on_card.memory["cuda:0"].kv < 0.3 * whole.memory["cuda:0"].kv
    assert any("25% of max_context x max_sequences: sequences" in n for n in on_card.notes)
    on_cpu = planning.on_one_device(budget, ram(GIB), "cpu")
    assert any("2 of 8 sequences run at once" in note for note in on_cpu.notes)


def test_overhead_is_made_of_its_parts(tiny: Path):
    made = planning.spread(rig(tiny), cards(GIB, GIB))
    for memory in made.memory.values():
        assert memory.overhead == sum(memory.parts.values())
        assert memory.parts.keys() == {
            "activations", "logits", "rounding", "workspace", "kernels", "graphs",
        }  # fmt: skip
    on_cpu = planning.on_one_device(rig(tiny), ram(GIB), "cpu").memory["cpu"]
    assert {"activations", "logits", "rounding", "kernels"} == on_cpu.parts.keys()


def test_keep_free_is_left_alone_on_every_device_of_the_kind(tiny: Path):
    config = model_config(tiny, keep_free={"cuda": 100 * MIB, "cpu": 10 * MIB})
    room = planning.budgets(config, cards(GIB, 2 * GIB, ram=GIB), ["cuda:0", "cuda:1", "cpu"])
    assert room == {
        "cuda:0": GIB + FIXED - 100 * MIB,
        "cuda:1": 2 * GIB + FIXED - 100 * MIB,
        "cpu": GIB - 10 * MIB,
    }


def test_max_memory_is_the_most_that_is_used(tiny: Path):
    config = model_config(tiny, max_memory={"cuda:0": 5 * MIB, "cpu": 999 * GIB})
    room = planning.budgets(config, cards(GIB, GIB, ram=GIB), ["cuda:0", "cuda:1", "cpu"])
    assert room == {"cuda:0": 5 * MIB, "cuda:1": GIB + FIXED, "cpu": GIB}


def test_a_plan_honours_keep_free_and_max_memory(llama_70b: Path):
    uneven = rig(llama_70b, quantize="nf4", max_memory={"cuda:0": 18 * GIB})
    with pytest.raises(DoesNotFit):
        planning.spread(uneven, TWO_24)
    made = planning.spread(uneven, hardware.invent("24GiB,48GiB"))
    assert made.memory["cuda:0"].total <= 18 * GIB
    with pytest.raises(DoesNotFit):
        planning.spread(rig(llama_70b, quantize="nf4", keep_free={"cuda": 2 * GIB}), TWO_24)


def test_the_disk_is_limited_too(tiny: Path):
    """1.8 MB do not fit into 1 MiB of RAM, and what is kept free on disk is not used."""
    changes = {"on_no_fit": "offload-disk", "max_memory": {"cpu": TWO_MIB}, "max_sequences": 1}
    machine = ram(GIB, disk=10 * MIB)
    made = planning.spread(model_config(tiny, **changes), machine)
    assert made.devices == ("cpu", "disk")
    for limit in ({"keep_free": {"disk": 10 * MIB}}, {"max_memory": {"cpu": TWO_MIB, "disk": 99}}):
        with pytest.raises(DoesNotFit):
            planning.spread(model_config(tiny, **{**changes, **limit}), machine)


# --- the map


@pytest.mark.parametrize(
    ("changes", "machine"),
    [
        ({}, cards(3 * MIB, 3 * MIB)),
        ({"on_no_fit": "offload-cpu"}, cards(2 * MIB)),
        ({"on_no_fit": "offload-disk", "max_memory": {"cpu": TWO_MIB}}, ram(GIB)),
        ({"on_no_fit": "offload-disk", "max_memory": {"cpu": MIB // 4}}, cards(2 * MIB)),
    ],
    ids=["two cards", "card and RAM", "RAM and disk", "card, RAM and disk"],
)
def test_transformers_reads_our_map_as_we_do(tiny: Path, changes: Any, machine: Any):
    """It matches prefixes: a map that says layers.1 without saying layers.10 takes both (F9)."""
    config = model_config(tiny, max_sequences=1, **changes)
    made = planning.spread(config, machine)
    assert len(made.devices) > 1
    hf_config = footprint.read_config(config)
    model = footprint.skeleton(config, hf_config, torch.float32)
    names = [
        n for n, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    ]
    theirs = expand_device_map(dict(made.load_kwargs["device_map"]), names)
    ours = {name: device_of(name, made.module_map) for name in names}
    assert {n: f"cuda:{d}" if isinstance(d, int) else d for n, d in theirs.items()} == ours
    assert None not in ours.values()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_tied_head_follows_the_embedding(tiny: Path, where: str):
    """A tied pair on two devices loads and dies at the first request (F8)."""
    changes = {"on_no_fit": f"offload-{where}", "max_sequences": 1}
    limit = {"cpu": 1} if where == "disk" else {}
    config = model_config(tiny, **changes, max_memory=limit)
    made = planning.spread(config, cards(2 * MIB))
    assert where in made.devices
    assert made.module_map["lm_head"] == made.module_map["model.embed_tokens"] == "cuda:0"
    spread = planning.spread(model_config(tiny, max_sequences=1), cards(3 * MIB, 3 * MIB))
    assert spread.module_map["lm_head"] == "cuda:0", "though the last layers are on cuda:1"
    assert "cuda:1" in spread.module_map.values()


def test_cards_are_numbers_to_accelerate(tiny: Path):
    """With strings and offload, its main device depends on PYTHONHASHSEED (F22)."""
    config = model_config(tiny, max_sequences=1, on_no_fit="offload-cpu")
    made = planning.spread(config, cards(2 * MIB))
    assert set(made.load_kwargs["device_map"].values()) == {0, "cpu"}
    assert made.load_kwargs["offload_folder"] == str(config.offload_folder)


def test_inputs_go_to_the_first_card_that_is_used(tiny: Path):
    """Somebody else fills cuda:0: the embedding, and so the ids, are on cuda:1."""
    made = planning.spread(model_config(tiny), cards(MIB // 8, GIB))
    assert made.main_device == "cuda:1"
    assert made.devices == ("cuda:1",)
    assert made.load_kwargs["device_map"] == {"": 1}


def test_without_a_card_everything_is_on_the_cpu(tiny: Path):
    made = planning.spread(model_config(tiny), ram(GIB))
    assert (made.module_map, made.main_device) == ({"": "cpu"}, "cpu")


# --- quantisers


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_missing_bitsandbytes_is_said_before_anything_is_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    config = model_config(tiny, quantize=quantize)
    for plan in (
        lambda: planning.spread(config, ram(GIB)),
        lambda: planning.on_one_device(config, ram(GIB), "cpu"),
    ):
        with pytest.raises(PlacementUnavailable) as caught:
            plan()
        assert caught.value.one_line() == (
            f"quantize: {quantize} needs bitsandbytes, which is not installed."
            "  fix: pip install 'moorage[bnb]'"
        )
    assert planning.spread(model_config(tiny), ram(GIB)), "nobody else needs it"


def test_quantised_products_are_computed_in_the_planned_dtype(tiny: Path):
    made = planning.spread(model_config(tiny, quantize="nf4", dtype="bfloat16"), ram(GIB))
    settings = made.load_kwargs["quantization_config"].to_dict()
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16"
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["bnb_4bit_use_double_quant"] is True


# --- files


def test_pickles_are_loaded_only_if_allowed_and_gguf_by_its_name(tiny: Path):
    """A load with `use_safetensors` refuses a pickle."""
    allowed = planning.load_kwargs(model_config(tiny, allow_pickle=True), "float32", {"": "cpu"})
    assert "use_safetensors" not in allowed
    gguf = planning.load_kwargs(model_config(tiny, gguf_file="m.gguf"), "float32", {"": "cpu"})
    assert gguf["gguf_file"] == "m.gguf"


# --- a map of one's own


def test_a_map_of_modules_becomes_a_placement(tiny: Path):
    map_ = {"": "cpu", "model.layers.1": "disk", "model.layers.10": "disk"}
    made = planning.mapped(model_config(tiny), ram(GIB), map_)
    assert {n for n, device in made.module_map.items() if device == "disk"} == {
        "model.layers.1",
        "model.layers.10",
    }
    layer = next(unit for unit in made.units if unit.name == "model.layers.1")
    whole = planning.on_one_device(model_config(tiny), ram(GIB), "cpu").memory["cpu"]
    assert made.memory["disk"].weights == 2 * layer.weights
    assert made.memory["disk"].kv == 0
    assert made.memory["cpu"].weights == whole.weights - 2 * layer.weights
    assert made.memory["cpu"].kv == whole.kv
    assert made.memory["cpu"].overhead == whole.overhead + layer.weights
    assert made.allows == {"offload"}


def test_a_map_of_the_whole_model_is_one_device(tiny: Path):
    assert planning.mapped(model_config(tiny), ram(GIB), {"": "cpu"}) == planning.on_one_device(
        model_config(tiny), ram(GIB), "cpu"
    )


def test_a_map_may_name_parents_and_a_tied_head_follows(tiny: Path):
    map_ = {"model": "cuda:1", "lm_head": "cuda:0"}
    made = planning.mapped(model_config(tiny), cards(GIB, GIB), map_)
    assert made.devices == ("cuda:1",)
    assert made.load_kwargs["device_map"] == {"": 1}


def test_what_a_map_rests_on_the_cpu_runs_on_the_first_card(tiny: Path):
    map_ = {"": "cuda:1", "model.layers.0": "cpu", "model.layers.11": "cuda:2"}
    made = planning.mapped(model_config(tiny), cards(GIB, GIB, GIB), map_)
    assert made.main_device == "cuda:1"
    assert made.devices == ("cuda:1", "cuda:2", "cpu")
    assert made.memory["cpu"].kv == 0
    kv = next(unit.kv for unit in made.units if unit.kv)
    assert made.memory["cuda:1"].kv == 11 * kv


@pytest.mark.parametrize(
    ("map_", "said"),
    [
        ({"": "cpu", "model.layer.1": "cpu"}, "no module model.layer.1.*mean 'model.layers.1'"),
        ({"": "cpu", "model.layers.12": "disk"}, "no module model.layers.12"),
        ({"model.layers": "cpu"}, "no device for model.embed_tokens, model.norm, model.rotary"),
    ],
)
def test_a_map_that_is_not_the_models_is_refused(tiny: Path, map_: dict[str, str], said: str):
    """transformers would ignore the one and put the other anywhere (F10)."""
    with pytest.raises(PlacementMismatch, match=said) as caught:
        planning.mapped(model_config(tiny), ram(GIB), map_)
    assert caught.value.failure_class == "F10"


def test_a_map_is_refused_for_the_device_that_is_too_small(tiny: Path):
    map_ = {"": "cuda:0", "model.layers.11": "cuda:1"}
    with pytest.raises(DoesNotFit, match=r"cuda:1 would need .* of overhead, and has "):
        planning.mapped(model_config(tiny), cards(GIB, MIB // 8), map_)
    with pytest.raises(PlacementUnavailable, match="needs cuda:1"):
        planning.mapped(model_config(tiny), cards(GIB), map_)


def test_quantised_layers_are_not_mapped_to_disk(tiny: Path):
    config = model_config(tiny, quantize="nf4")
    with pytest.raises(DoesNotFit, match="cannot be offloaded"):
        planning.mapped(config, ram(GIB), {"": "cpu", "model.layers.11": "disk"})


def test_the_parts_that_a_map_can_name_are_told_in_order(tiny: Path):
    names = [unit.name for unit in planning.units(model_config(tiny), ram(GIB))]
    assert names[0] == "model.embed_tokens"
    assert names[-1] == "lm_head"
    assert [n for n in names if ".layers." in n] == [f"model.layers.{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy": "single-gpu", "quantize": "nf4"}, "84 linears of this one would be"),
        ({"strategy": "auto-shard"}, "this one is on cuda:0 and cuda:1"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_the_plan(tiny: Path, changes: dict, why: str):
    config = rig(tiny, compile=True, **changes)
    strategy = registry.build().select(config.strategy)
    with pytest.raises(PlacementUnavailable, match=f"compile: true needs .*; .*{why}"):
        strategy.plan(config, cards(GIB, GIB))
