"""F16: every tensor is there and where it belongs, and its values are not the checkpoint's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from service.errors import ModelUnavailable
from service.errors import PlacementMismatch
from service.models import folder as model_folder
from service.placement.certificate import Certificate
from service.placement.certificate import certify
from service.testing.self_test.values import TENSOR
from service.testing.self_test.values import edit
from service.testing.self_test.values import noise
from tests.support.placing import bring_up
from tests.support.placing import logits
from tests.support.placing import offloaded
from tests.support.placing import planned
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny

TENSORS = 4 * 9 + 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


def sampled(certificate: Certificate) -> int:
    assert certificate.valid, certificate.failure()
    count: int = certificate.as_dict()["tensors_sampled"]
    return count


def test_plain_transformers_answers_from_a_model_that_was_written_into(folder: Path) -> None:
    """Fails when torch or transformers guards the weights of a model in eval mode."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    noise(model.get_parameter(TENSOR))
    after = logits(model)
    assert torch.isfinite(after).all()
    assert not torch.allclose(before, after)


def test_ours_refuses_and_names_tensor_and_file(folder: Path) -> None:
    loaded = bring_up(folder)
    noise(loaded.model.get_parameter(TENSOR))
    error = refusal(certify(loaded))
    assert isinstance(error, PlacementMismatch)
    assert (error.failure_class, error.tensors) == ("F16", (TENSOR,))
    assert error.message == (
        f"{TENSOR} differs from model.safetensors (F16): 1 of {TENSORS} sampled tensors do not "
        "hold what was loaded"
    )


def test_ours_names_some_and_counts_the_rest(folder: Path) -> None:
    loaded = bring_up(folder)
    for parameter in loaded.model.parameters():
        noise(parameter)
    error = refusal(certify(loaded))
    assert f"and {TENSORS - 3} more differ from" in error.message
    assert len(error.tensors) == TENSORS


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_load_casts_is_the_same(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie=False, layers=4, dtype=stored)
    assert sampled(certify(bring_up(folder, dtype=dtype))) == TENSORS


def test_what_was_rounded_and_widened_again_is_the_same(folder: Path) -> None:
    loaded = bring_up(folder, dtype="bfloat16")
    loaded.model.float()
    assert sampled(certify(loaded)) == TENSORS


def test_quantised_weights_are_skipped_and_their_neighbours_are_not(folder: Path) -> None:
    loaded = bring_up(folder, quantize="nf4")
    assert sampled(certify(loaded)) == TENSORS - 4 * 7
    noise(loaded.model.model.norm.weight)
    assert refusal(certify(loaded)).tensors == ("model.norm.weight",)


def test_a_tied_head_is_the_embeddings_row(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie=True, layers=4)
    assert sampled(certify(bring_up(folder))) == TENSORS - 1


def test_experts_that_were_put_together_are_skipped(tmp_path: Path) -> None:
    from tests.failures.test_no_false_alarms import saved

    folder = saved(tmp_path / "model", "mixtral", None, "float32")
    loaded = bring_up(folder)
    count = sampled(certify(loaded))
    assert 0 < count < sum(1 for _ in loaded.model.parameters())


def test_a_head_that_was_saved_without_its_model_is_compared_by_its_own_name(
    tmp_path: Path,
) -> None:
    """As the old GPT-2 on the hub: names without "transformer."."""
    folder = save_tiny(tmp_path / "model", "gpt2", layers=4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = bring_up(folder)
    assert sampled(certify(loaded)) == len(tensors)
    noise(loaded.model.transformer.ln_f.weight)
    assert refusal(certify(loaded)).tensors == ("transformer.ln_f.weight",)


# --- offloaded


def test_offloaded_tensors_are_compared_too_and_not_read_as_a_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.placement.tensors import Owner

    def fetch(owner: Owner) -> torch.Tensor:
        raise AssertionError(f"{owner.key} is read as a whole")

    loaded = offloaded(folder)
    monkeypatch.setattr(Owner, "fetch", fetch)
    assert sampled(certify(loaded)) == TENSORS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_sees_what_was_written_into_the_offload_folder(tmp_path: Path, dtype: str) -> None:
    """Where a load casts, transformers writes the layers anew into the offload folder."""
    folder = save_tiny(tmp_path / "model", "llama", tie=False, layers=4)
    loaded = offloaded(folder, dtype=dtype)
    away = [name for name, p in loaded.model.named_parameters() if p.is_meta]
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    # the hooks read their layers from now on as somebody else wrote them
    edit(folder, lambda tensors: [noise(tensors[name]) for name in away])
    moved = replace(loaded, config=loaded.config.model_copy(update={"folder": kept}))
    error = refusal(certify(moved))
    assert error.failure_class == "F16"
    assert set(error.tensors) == set(away)


# --- the file itself


def test_a_file_that_was_exchanged_since_the_load_is_seen(folder: Path) -> None:
    loaded = bring_up(folder)
    edit(folder, lambda tensors: noise(tensors[TENSOR]))
    assert refusal(certify(loaded)).tensors == (TENSOR,)


def test_a_flipped_byte_of_the_file_is_loaded_as_it_is_and_only_a_manifest_sees_it(
    folder: Path,
) -> None:
    """Model and file agree: what they agree on is wrong."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x10
    manifest = folder / model_folder.MANIFEST
    digest = {"bytes": path.stat().st_size, "sha256": model_folder.sha256(path)}
    path.write_bytes(data)
    assert sampled(certify(bring_up(folder))) == TENSORS
    manifest.write_text(json.dumps({"files": {"model.safetensors": digest}}))
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors"):
        model_folder.check(folder)


def test_what_is_meant_is_named_by_the_strategy(folder: Path) -> None:
    plan = replace(planned(folder), allows=frozenset({TENSOR}))
    loaded = bring_up(folder, variant(plan=lambda config, hardware: plan))
    noise(loaded.model.get_parameter(TENSOR))
    assert sampled(certify(loaded)) == TENSORS - 1
