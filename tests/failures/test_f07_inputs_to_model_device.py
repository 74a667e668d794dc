"""F7: inputs sent to `model.device`, which is meta when the embedding is offloaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.engine.runner import Runner
from service.errors import PlacementMismatch
from service.placement.certificate import certify
from service.placement.inputs import input_device
from service.placement.inputs import to_input_device
from service.placement.loading import Loaded
from service.testing.placing import CPU_PARTS
from service.testing.placing import dispatched
from tests.support.engines import last_logits
from tests.support.placing import IDS
from tests.support.placing import bring_up
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_config

ON_DISK = {"model.embed_tokens": "disk"}
PLACES = {**CPU_PARTS, **ON_DISK}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False)


def ours(folder: Path, **hooks: Any) -> Loaded:
    """A strategy of somebody who wants the embedding on disk and says so in its plan."""
    from dataclasses import replace

    from tests.support.placing import built_in

    def plan(config: Any, hardware: Any) -> Any:
        placement = built_in().select("cpu").plan(config, hardware)
        kwargs = {
            **placement.load_kwargs,
            "device_map": PLACES,
            "offload_folder": str(config.offload_folder),
        }
        return replace(
            placement,
            devices=("cpu", "disk"),
            module_map=PLACES,
            load_kwargs=kwargs,
            allows=frozenset({"offload"}),
        )

    return bring_up(folder, variant(plan=plan, **hooks))


def test_plain_model_device_is_meta_and_inputs_sent_there_raise(folder: Path) -> None:
    """Fails when `model.device` stops being the first parameter's device."""
    model = dispatched(folder, ON_DISK)
    assert model.device.type == "meta"
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model(IDS.to(model.device))
    with pytest.raises(RuntimeError, match=r"Tensor.item\(\) cannot be called on meta tensors"):
        model.generate(IDS.to(model.device), max_new_tokens=2)


def test_ours_places_right_and_answers_like_the_model_in_ram(folder: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    loaded = ours(folder)
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    assert loaded.model.device.type == "meta"
    placed = loaded.strategy.place_inputs(loaded.model, {"input_ids": IDS})
    assert placed["input_ids"].device == torch.device("cpu")
    torch.testing.assert_close(logits(loaded.model, placed["input_ids"]), expected)
    runner = Runner(loaded.model, loaded.strategy.place_inputs, max_context=64)
    runner.open()
    torch.testing.assert_close(last_logits(runner, IDS[0].tolist()), expected[0, -1])


def test_a_strategy_that_sends_inputs_to_model_device_is_refused(folder: Path) -> None:
    def place_inputs(model: Any, inputs: Any) -> Any:
        return {name: tensor.to(model.device) for name, tensor in inputs.items()}

    error = refusal(certify(ours(folder, place_inputs=place_inputs)))
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F7"
    assert error.message == (
        "strategy cpu: place_inputs put input_ids on meta; inputs belong on cpu (F7); "
        "model.device says meta"
    )
    assert error.hint == "return service.placement.inputs.to_input_device(model, inputs)"


def test_a_plan_that_names_another_main_device_is_refused(folder: Path) -> None:
    from dataclasses import replace

    loaded = bring_up(folder)
    wrong = replace(loaded, placement=replace(loaded.placement, main_device="cuda:1"))
    error = refusal(certify(wrong))
    assert error.failure_class == "F7"
    assert "inputs belong on cpu but the plan says cuda:1 (F7)" in error.message


def test_a_model_of_which_nobody_knows_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(PlacementMismatch, match=r"\(F7\); model.device says meta") as caught:
        input_device(model)
    assert caught.value.hint is not None
    assert "main_device" in caught.value.hint
    assert input_device(model, "cuda:1") == torch.device("cuda:1")
    with pytest.raises(PlacementMismatch):
        to_input_device(model, {"input_ids": IDS})
