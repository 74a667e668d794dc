"""F13: 4-bit was asked for, and `is_loaded_in_4bit` says so, but the weights are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel

from service.errors import PlacementMismatch
from service.placement.certificate import certify
from service.testing.self_test.quantised import four_bit
from service.testing.self_test.quantised import four_bit_layers
from tests.support.placing import bring_up
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny

# of a tiny llama of two layers: four of the attention and three of the MLP in each
LINEARS = 14


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False)


def test_plain_a_model_without_one_4_bit_layer_says_it_is_4_bit(folder: Path) -> None:
    """Fails when transformers counts before it says so."""
    model = four_bit(folder, "model", "lm_head")
    assert model.is_loaded_in_4bit is True
    assert four_bit_layers(model) == 0
    in_full = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(logits(model), in_full)


def test_plain_half_a_model_in_4_bit_says_it_is_4_bit(folder: Path) -> None:
    """Fails as the one above."""
    model = four_bit(folder, "model.layers.1", "lm_head")
    assert model.is_loaded_in_4bit is True
    assert four_bit_layers(model) == LINEARS // 2


@pytest.mark.parametrize(
    ("skipped", "found"),
    [(("model", "lm_head"), 0), (("model.layers.1", "lm_head"), LINEARS // 2)],
)
def test_ours_counts_the_layers_against_the_plan(
    folder: Path, skipped: tuple[str, ...], found: int
) -> None:
    certificate = judged(four_bit(folder, *skipped), folder, quantize="nf4")
    error = refusal(certificate)
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F13"
    assert error.message == f"asked for nf4: {found} of {LINEARS} linears are quantised (F13)"
    assert certificate.quantized_linears == found
    assert "model.layers.1.mlp.down_proj.weight" in error.tensors
    assert error.hint is not None


def test_a_strategy_that_forgets_to_quantise_is_refused(folder: Path) -> None:
    def load(config: Any, placement: Any) -> PreTrainedModel:
        kwargs = {k: v for k, v in placement.load_kwargs.items() if k != "quantization_config"}
        return AutoModelForCausalLM.from_pretrained(config.folder, **kwargs)

    error = refusal(certify(bring_up(folder, variant("four-bit", load=load))))
    assert error.message == f"asked for nf4: 0 of {LINEARS} linears are quantised (F13)"


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_ours_quantises_all_that_was_planned(folder: Path, quantize: str) -> None:
    loaded = bring_up(folder, quantize=quantize)
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    assert certificate.quantized_linears == loaded.placement.quantized == LINEARS
    [check] = [check for check in certificate.checks if check.name == "F13"]
    assert check.checked == LINEARS


def test_weights_that_nobody_asked_to_quantise_do_not_pass_for_plain_ones(folder: Path) -> None:
    error = refusal(judged(four_bit(folder, "lm_head"), folder))
    assert error.failure_class == "F13"
    assert error.message.startswith("quantize is none, but 14 linears are quantised (F13)")
    assert len(error.tensors) == LINEARS
