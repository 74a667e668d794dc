"""F14: a quantised layer that loads and cannot run."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig

from service.errors import PlacementMismatch
from service.placement.certificate import certify
from tests.support.placing import bring_up
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.skipif(
    not has_avx512bf16(),
    reason="bitsandbytes packs 4-bit layers in blocks only where the CPU has AVX512-BF16",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, hidden_size=32, head_dim=8)


def test_plain_transformers_loads_it_and_dies_at_the_first_request(folder: Path) -> None:
    """Fails when bitsandbytes runs 4-bit layers of any size on the CPU, or refuses to make them."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"},
    )
    with pytest.raises(RuntimeError, match=r"shape '\[32, 0\]' is invalid"):
        logits(model)


@pytest.mark.parametrize(("strategy", "quantize"), [("cpu", "nf4"), ("four-bit", "fp4")])
def test_ours_refuses_and_names_layer_and_block_size(
    folder: Path, strategy: str, quantize: str
) -> None:
    error = refusal(certify(bring_up(folder, strategy, quantize=quantize)))
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F14"
    assert error.tensors == ("model.layers.0.self_attn.q_proj.weight",)
    assert "its input size is 32 and the block size is 64 (F14)" in error.message
    assert error.hint is not None
    assert "quantize: none or int8" in error.hint


def test_ours_serves_the_same_model_in_8_bit(folder: Path) -> None:
    certificate = certify(bring_up(folder, quantize="int8"))
    assert certificate.valid, certificate.failure()


def test_a_layer_without_its_scales_is_refused(tmp_path: Path) -> None:
    loaded = bring_up(save_tiny(tmp_path / "wide", "llama", tie=False), quantize="nf4")
    loaded.model.model.layers[1].mlp.down_proj.weight.quant_state = None
    error = refusal(certify(loaded))
    assert (error.failure_class, error.tensors) == (
        "F14",
        ("model.layers.1.mlp.down_proj.weight",),
    )
    assert "is quantised and has no scales" in error.message


def test_a_layer_whose_scales_are_elsewhere_is_refused(tmp_path: Path) -> None:
    loaded = bring_up(save_tiny(tmp_path / "wide", "llama", tie=False), quantize="int8")
    weight = loaded.model.model.layers[0].self_attn.q_proj.weight
    weight.SCB = torch.empty_like(weight.SCB, device="meta")
    failed = {check.name: check.error for check in certify(loaded).checks}
    error = failed["F14"]
    assert error is not None
    assert "scales on meta, its weight is on cpu (F14)" in error.message
