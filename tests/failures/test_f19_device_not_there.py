"""F19: a device that is not there, and F22: a main device that is random."""

from pathlib import Path
from typing import Any

import accelerate.big_modeling
import pytest
import torch
from transformers import AutoModelForCausalLM

from service.errors import PlacementUnavailable
from service.placement.certificate import certify
from service.placement.hardware import invent
from tests.support.placing import IDS
from tests.support.placing import ROOMY
from tests.support.placing import bring_up
from tests.support.placing import planned
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_config

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


@without_gpu
def test_plain_transformers_does_not_say_what_to_do(folder: Path) -> None:
    """Fails when the message gets better."""
    with pytest.raises(RuntimeError, match=r"^Cannot access accelerator device when none is"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=0)


def test_plain_transformers_loads_to_meta_when_asked(folder: Path) -> None:
    """Fails when `device_map="meta"` is refused."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="meta")
    assert all(p.is_meta for p in model.parameters())
    assert model(IDS).logits.is_meta


def test_ours_refuses_before_anything_is_read_and_says_what_to_do(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(PlacementUnavailable) as caught:
        planned(folder, "single-gpu", ROOMY)
    error = caught.value
    assert error.message == ("strategy single-gpu needs cuda:0, but there is no accelerator (F19)")
    assert error.failure_class == "F19"
    assert error.exit_status == 4
    assert error.hint is not None
    assert error.hint.startswith("use strategy: cpu")


def test_ours_names_the_devices_that_are_there(folder: Path) -> None:
    with pytest.raises(PlacementUnavailable, match=r"needs cuda:3, but .* has cuda:0, cuda:1 only"):
        planned(folder, "single-gpu", invent("2x24GiB"), options={"device": 3})


def test_a_strategy_that_loads_to_meta_is_refused(folder: Path) -> None:
    def load(config: Any, placement: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(config.folder, device_map="meta")

    error = refusal(certify(bring_up(folder, variant(load=load))))
    assert error.failure_class == "F1"
    assert len(error.tensors) == 39


# --- F22


def main_devices(monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[Any, Any]]) -> list[Any]:
    """The main device accelerate chooses for a map over each pair of devices and the CPU."""
    chosen: list[Any] = []
    monkeypatch.setattr(
        accelerate.big_modeling,
        "attach_align_device_hook_on_blocks",
        lambda model, execution_device, **kwargs: chosen.append(execution_device[""]),
    )
    monkeypatch.setattr(accelerate.big_modeling, "check_cuda_p2p_ib_support", lambda: True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    for first, second in pairs:
        places = {
            "model.embed_tokens": first,
            "model.layers.0": first,
            "model.layers.1": "cpu",
            "model.norm": second,
            "model.rotary_emb": first,
            "lm_head": second,
        }
        accelerate.big_modeling.dispatch_model(model, places, state_dict={}, force_hooks=True)
    return chosen


def test_plain_the_main_device_of_a_map_with_names_follows_a_hash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails when `dispatch_model` takes the first device of the map instead of one of a set."""
    numbers = [(i, j) for i in range(8) for j in range(i + 1, 8)]
    names = [(f"cuda:{i}", f"cuda:{j}") for i, j in numbers]
    assert main_devices(monkeypatch, names) != [first for first, _ in names]


def test_numbers_make_it_the_first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our maps rely on."""
    numbers = [(i, j) for i in range(8) for j in range(i + 1, 8)]
    assert main_devices(monkeypatch, numbers) == [first for first, _ in numbers]


def test_our_maps_number_accelerators(folder: Path) -> None:
    whole = planned(folder).memory["cpu"].total
    limits = {"cuda:0": whole * 2 // 3, "cuda:1": whole * 2 // 3}
    placement = planned(folder, "auto-shard", invent("2x24GiB"), max_memory=limits)
    assert placement.devices == ("cuda:0", "cuda:1")
    assert placement.main_device == "cuda:0"
    assert set(placement.load_kwargs["device_map"].values()) == {0, 1}
    assert set(placement.module_map.values()) == {"cuda:0", "cuda:1"}


def test_our_maps_number_accelerators_beside_the_cpu(folder: Path) -> None:
    whole = planned(folder).memory["cpu"].total
    placement = planned(
        folder,
        "auto-shard",
        invent("24GiB"),
        max_memory={"cuda:0": whole - 40_000},
        on_no_fit="offload-cpu",
    )
    assert set(placement.load_kwargs["device_map"].values()) == {0, "cpu"}


def test_single_gpu_numbers_its_device(folder: Path) -> None:
    placement = planned(folder, "single-gpu", invent("2x24GiB"), options={"device": 1})
    assert placement.load_kwargs["device_map"] == {"": 1}
    assert (placement.devices, placement.main_device) == (("cuda:1",), "cuda:1")
