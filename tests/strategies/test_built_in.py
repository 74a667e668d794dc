"""Every built-in strategy on a real tiny model: planned, loaded, proven, and right."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.errors import ConfigError
from service.errors import PlacementMismatch
from service.errors import PlacementUnavailable
from service.placement import cutting
from service.placement import registry
from service.placement.certificate import Certificate
from service.placement.certificate import certify
from service.placement.hardware import Hardware
from service.placement.loading import Loaded
from service.placement.overhead import CPU_KERNELS
from service.placement.registry import Strategy
from tests.support.planned import GIB
from tests.support.planned import MIB
from tests.support.planned import bring_up
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.tiny import save_tiny

IDS = {"input_ids": torch.tensor([[72, 101, 108, 108, 111]])}


def strategy(name: str) -> Strategy:
    return registry.build().select(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "m", "llama", layers=12)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tied", "llama", layers=12, tie=True)


def served(
    name: str, folder: Path, hardware: Hardware | None = None, **changes: Any
) -> tuple[Loaded, Certificate]:
    """The model brought up by this strategy, and its certificate, which is valid."""
    config = model_config(folder, strategy=name, **changes)
    loaded = bring_up(strategy(name), config, hardware or ram(GIB))
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    return loaded, certificate


def logits(loaded: Loaded) -> torch.Tensor:
    """Through the strategy's own `place_inputs`, as the engine does it."""
    with torch.inference_mode():
        placed = loaded.strategy.place_inputs(loaded.model, IDS)
        return loaded.model(**placed, use_cache=False).logits


def plain_logits(folder: Path) -> torch.Tensor:
    """What transformers computes with the whole model in RAM."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return model(**IDS, use_cache=False).logits


# --- in RAM


@pytest.mark.parametrize("name", ["cpu", "auto-shard"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_a_model_in_ram_answers_as_plain_transformers(tmp_path: Path, name: str, arch: str):
    folder = save_tiny(tmp_path / "m", arch)
    loaded, certificate = served(name, folder)
    assert torch.equal(logits(loaded), plain_logits(folder))
    assert certificate.devices == {"cpu": loaded.placement.memory["cpu"].weights}


def test_cpu_ignores_the_cards(folder: Path):
    loaded, _ = served("cpu", folder, cards(GIB, GIB))
    assert loaded.placement.devices == ("cpu",)


@pytest.mark.parametrize("name", ["cpu", "auto-shard", "four-bit", "single-gpu"])
def test_inputs_are_copied_into_a_new_dict_and_kept_as_they_are(folder: Path, name: str):
    loaded, _ = served("cpu", folder)
    given = {**IDS, "position_ids": torch.arange(5)[None]}
    placed = strategy(name).place_inputs(loaded.model, given)
    assert placed is not given
    assert placed.keys() == given.keys()
    assert all(torch.equal(placed[key], given[key]) for key in given)


def test_validate_names_a_tensor_that_was_moved(folder: Path):
    loaded, _ = served("cpu", folder)
    loaded.model.model.layers[3].mlp.up_proj.to("meta")
    with pytest.raises(PlacementMismatch) as caught:
        loaded.strategy.validate(loaded.model, loaded.placement)
    assert caught.value.message == ("model.layers.3.mlp.up_proj.weight is on meta, planned on cpu")
    assert not certify(loaded).valid


# --- offloaded


@pytest.mark.parametrize("which", ["folder", "tied"])
def test_a_model_partly_on_disk_answers_as_one_in_ram(which: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(which)
    room = 2 * MIB + CPU_KERNELS
    changes = {"on_no_fit": "offload-disk", "max_memory": {"cpu": room}, "max_sequences": 1}
    loaded, certificate = served("auto-shard", folder, **changes)
    on_disk = [n for n, device in loaded.placement.module_map.items() if device == "disk"]
    assert "model.layers.11" in on_disk
    assert "model.layers.0" not in on_disk
    assert certificate.devices == {
        device: memory.weights for device, memory in loaded.placement.memory.items()
    }
    assert torch.equal(logits(loaded), plain_logits(folder))


def test_offload_that_was_not_planned_is_refused(folder: Path):
    """The same map, loaded under a plan that does not say so (F12)."""
    room = 2 * MIB + CPU_KERNELS
    changes = {"on_no_fit": "offload-disk", "max_memory": {"cpu": room}, "max_sequences": 1}
    loaded, _ = served("auto-shard", folder, **changes)
    silent = replace(loaded, placement=replace(loaded.placement, allows=frozenset()))
    failure = certify(silent).failure()
    assert failure is not None
    assert failure.failure_class == "F12"


# --- single-gpu


@pytest.mark.parametrize("options", [{}, {"device": 3}])
def test_single_gpu_without_a_gpu_says_what_to_use(folder: Path, options: dict[str, int]):
    config = model_config(folder, strategy="single-gpu", options=options)
    chosen = strategy("single-gpu")
    device = f"cuda:{options.get('device', 0)}"
    with pytest.raises(PlacementUnavailable) as caught:
        chosen.plan(registry.settle(config, chosen, {}), ram(GIB))
    assert caught.value.one_line() == (
        f"strategy single-gpu needs {device}, but there is no accelerator (F19)"
        "  fix: use strategy: cpu, or strategy: auto-shard, which takes what is there"
    )
    assert caught.value.exit_status == 4


def test_single_gpu_takes_the_card_it_is_told(folder: Path):
    chosen = strategy("single-gpu")
    config = model_config(folder, strategy="single-gpu", options={"device": 1})
    made = chosen.plan(registry.settle(config, chosen, {}), cards(GIB, GIB))
    assert made.load_kwargs["device_map"] == {"": 1}
    assert made.devices == ("cuda:1",)


def test_single_gpu_refuses_a_card_below_zero():
    chosen = strategy("single-gpu")
    config = model_config(Path("m"), options={"device": -1})
    with pytest.raises(ConfigError, match=r"options\.device: input should be greater than or"):
        registry.settle(config, chosen, {})


# --- quantised, for real, on the CPU


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_four_bit_counts_its_linears(folder: Path, quantize: str):
    loaded, certificate = served("four-bit", folder, quantize=quantize)
    linears = [m for m in loaded.model.modules() if type(m).__name__ == "Linear4bit"]
    assert certificate.quantized_linears == len(linears) == loaded.placement.quantized == 12 * 7
    assert {m.weight.quant_type for m in linears} == {quantize}
    # the same weights, less exactly: no noise, and no copy
    near, exact = logits(loaded), plain_logits(folder)
    assert not torch.equal(near, exact)
    alike = torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0)
    assert alike > 0.4


def test_four_bit_is_nf4_unless_the_operator_says_otherwise(folder: Path):
    config = model_config(folder)
    assert registry.settle(config, strategy("four-bit"), {}).quantize == "nf4"


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_four_bit_refuses_what_is_not_four_bit(folder: Path, quantize: str):
    with pytest.raises(PlacementUnavailable, match=f"four-bit cannot do quantize: {quantize}"):
        strategy("four-bit").plan(model_config(folder, quantize=quantize), ram(GIB))


def test_four_bit_refuses_a_model_that_is_not(folder: Path):
    """`is_loaded_in_4bit` proves nothing (F13)."""
    loaded, _ = served("cpu", folder)
    loaded.model.is_loaded_in_4bit = True
    with pytest.raises(PlacementMismatch, match=r"no linear layer is 4-bit \(F13\)"):
        strategy("four-bit").validate(loaded.model, loaded.placement)


def test_int8_of_bitsandbytes_runs_on_the_cpu(folder: Path):
    loaded, certificate = served("auto-shard", folder, quantize="int8")
    linears = [m for m in loaded.model.modules() if type(m).__name__ == "Linear8bitLt"]
    assert certificate.quantized_linears == len(linears) == 12 * 7
    near, exact = logits(loaded), plain_logits(folder)
    assert torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_quantised_load_takes_what_was_planned(folder: Path, quantize: str):
    """Less the code tables, which bitsandbytes drops when it packs a layer for the CPU."""
    loaded, certificate = served("auto-shard", folder, quantize=quantize)
    planned, found = loaded.placement.memory["cpu"].weights, certificate.devices["cpu"]
    tables = 0 if quantize == "int8" else certificate.quantized_linears * cutting.TABLES
    assert planned - tables <= found <= planned
