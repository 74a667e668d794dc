"""F2: a non-persistent buffer on meta: in no checkpoint, so no key is missing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.errors import PlacementMismatch
from service.testing.self_test.values import uncomputed
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.tiny import save_tiny

FREQUENCIES = ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False)


def test_plain_torch_says_all_keys_matched_and_leaves_the_buffer_on_meta(folder: Path) -> None:
    """Fails when `load_state_dict` or `init_empty_weights` looks after such buffers."""
    model = uncomputed(folder)  # raises if a key is reported
    assert not any(p.is_meta for p in model.parameters())
    assert [name for name, b in model.named_buffers() if b.is_meta] == list(FREQUENCIES)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor; no data!"):
        logits(model)


def test_plain_torch_computes_silently_with_such_a_buffer_in_a_product() -> None:
    """The other outcome: no error, no data. Fails when torch refuses it."""
    linear = torch.nn.Linear(4, 4)
    linear.register_buffer("scale", torch.ones(4, 4, device="meta"), persistent=False)
    result = torch.mm(torch.zeros(4, 4), linear.scale)
    assert result.device.type == "cpu"


def test_ours_refuses_and_says_that_no_checkpoint_has_it(folder: Path) -> None:
    error = refusal(judged(uncomputed(folder), folder))
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F2"
    assert error.tensors == FREQUENCIES
    assert "were left on meta (F2): in no checkpoint and never computed" in error.message


def test_ours_sees_one_buffer_moved_after_a_good_load(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to("meta")
    error = refusal(judged(model, folder))
    assert (error.failure_class, error.tensors) == ("F2", FREQUENCIES[:1])
