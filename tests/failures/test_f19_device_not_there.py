"""F19: a device that is not there."""

from pathlib import Path
from typing import Any

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
