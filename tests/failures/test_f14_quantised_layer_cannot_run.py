"""F14: a quantised layer that loads and cannot run."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig

from service.errors import PlacementMismatch
from service.placement import certificate
from service.placement.certificate import certify
from service.testing.self_test.quantised import NARROW
from service.testing.self_test.quantised import PACKING
from service.testing.self_test.quantised import four_bit
from service.testing.self_test.quantised import packs
from tests.support.placing import bring_up
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.skipif(not packs(), reason=PACKING)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, **NARROW)


def test_plain_transformers_loads_it_and_dies_at_the_first_request(folder: Path) -> None:
    """Fails when bitsandbytes runs 4-bit layers of any size on the CPU, or refuses to make them."""
    model = four_bit(folder)
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
    folder = save_tiny(tmp_path / "wide", "llama", tie=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.SCB = torch.empty_like(weight.SCB, device="meta")
    failed = {check.name: check.error for check in judged(model, folder, quantize="int8").checks}
    error = failed["F14"]
    assert error is not None
    assert "scales on meta, its weight is on cpu (F14)" in error.message


def test_a_weight_that_its_module_reads_itself_is_refused_by_the_modules_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mixer of a Mamba multiplies with `dt_proj.weight`, whatever that has become. Fails when
    transformers keeps it from being quantised.
    """
    from tests.failures.test_no_false_alarms import saved

    folder = saved(tmp_path / "model", "mamba", None, "float32")
    # our own plan leaves that weight alone, so the count would be refused before
    others = tuple(check for check in certificate.CHECKS if check[0] != "F13")
    monkeypatch.setattr(certificate, "CHECKS", others)
    error = refusal(judged(four_bit(folder), folder, quantize="nf4"))
    assert error.message.startswith("backbone.layers.0.mixer cannot run: RuntimeError: Expected")


def test_a_layer_of_an_output_size_that_cannot_be_computed_is_refused_by_name(
    tmp_path: Path,
) -> None:
    """The gate of Qwen2-MoE's shared expert has one output; bitsandbytes only says so by `assert`.
    Fails when it computes such layers on the CPU.
    """
    from tests.failures.test_no_false_alarms import saved

    folder = saved(tmp_path / "model", "qwen2_moe", None, "float32")
    error = refusal(certify(bring_up(folder, "four-bit", quantize="nf4")))
    assert error.failure_class == "F14"
    assert error.tensors == ("model.layers.0.mlp.shared_expert_gate.weight",)
    assert "its output size is 1 and the block size is 64 (F14)" in error.message
    assert "N must be divisible by block_n" in error.message
