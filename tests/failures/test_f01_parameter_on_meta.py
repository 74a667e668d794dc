"""F1: a parameter on meta that no offload hook owns.

The class Moorage exists for: most of the time it raises nothing and answers with whatever was in
memory.
"""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from service.errors import PlacementMismatch
from service.testing.self_test.values import stranded
from tests.support.placing import IDS
from tests.support.placing import bring_up
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.placing import scribble
from tests.support.placing import variant
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_config

SILENT = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False)


@pytest.mark.parametrize("module", SILENT)
def test_plain_transformers_answers_garbage_without_an_error(folder: Path, module: str) -> None:
    """Fails when torch refuses to multiply a CPU tensor with a meta weight: then F1 is loud."""
    healthy = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(healthy)
    model = stranded(folder, module)
    scribble(healthy)
    values = logits(model)
    assert values.device.type == "cpu"
    assert values.shape == expected.shape
    assert not torch.allclose(values, expected)
    answer = model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert answer.shape[1] > IDS.shape[1]


def test_plain_transformers_raises_for_a_norm_which_is_the_lucky_outcome(folder: Path) -> None:
    """The founding error, word for word. Fails when torch words it differently."""
    with pytest.raises(RuntimeError, match="Tensor on device cpu is not on the expected device"):
        logits(stranded(folder, "model.norm"))


def test_plain_load_state_dict_leaves_a_missing_tensor_on_meta_and_answers(folder: Path) -> None:
    """Fails when `load_state_dict(strict=False)` refuses to leave tensors on meta."""
    healthy = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(healthy)
    weights = healthy.state_dict()
    del weights["lm_head.weight"]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(tiny_config("llama", tie=False)).eval()
    assert model.load_state_dict(weights, strict=False, assign=True).missing_keys
    scribble(healthy)
    assert not torch.allclose(logits(model), expected)


@pytest.mark.parametrize("module", [*SILENT, "model.norm"])
def test_ours_refuses_and_names_the_tensor_its_bytes_and_the_way_out(
    folder: Path, module: str
) -> None:
    model = stranded(folder, module)
    size = sum(p.numel() * 4 for p in model.get_submodule(module).parameters())
    error = refusal(judged(model, folder))
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F1"
    assert error.tensors == (f"{module}.weight",)
    assert error.message.startswith(f"{module}.weight was left on meta (F1): never materialised")
    assert f"{size:,} bytes" in error.message
    assert "Strategy cpu" in error.message
    assert error.hint is not None
    assert "moorage plan --deployment test" in error.hint


def test_ours_names_the_first_tensors_and_counts_the_rest(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].to("meta")
    error = refusal(judged(model, folder))
    assert len(error.tensors) == 9
    assert "and 6 more were left on meta" in error.message


def test_the_traced_forward_alone_finds_it_too(folder: Path) -> None:
    """The certificate's last line of defence, for what a scan of names could miss."""
    from service.placement import traced

    for module in SILENT:
        model = stranded(folder, module)
        with pytest.raises(PlacementMismatch, match=rf"{module} computes .*on meta \(F1\)"):
            traced.forward(model, {"input_ids": IDS})


def test_a_forward_is_not_tried_with_a_tensor_that_is_known_to_be_missing(folder: Path) -> None:
    certificate = judged(stranded(folder, "lm_head"), folder)
    assert "forward" not in [check.name for check in certificate.checks]
    assert not certificate.valid


def test_a_validate_that_sees_nothing_does_not_switch_the_check_off(folder: Path) -> None:
    blind = variant(
        load=lambda config, placement: stranded(config.folder, "lm_head"),
        validate=lambda model, placement: None,
    )
    from service.placement.certificate import certify

    assert refusal(certify(bring_up(folder, blind))).failure_class == "F1"


def test_offload_hooks_that_were_removed_leave_tensors_nobody_owns(tmp_path: Path) -> None:
    """F17: the same finding, after `remove_hook_from_submodules` on an offloaded model."""
    from accelerate.hooks import remove_hook_from_submodules

    from service.placement.certificate import certify
    from tests.support.placing import offloaded

    folder = save_tiny(tmp_path / "deep", "llama", tie=False, layers=4)
    loaded = offloaded(folder)
    assert certify(loaded).valid
    remove_hook_from_submodules(loaded.model.model.layers[3])
    error = refusal(certify(loaded))
    assert error.failure_class == "F1"
    assert all(name.startswith("model.layers.3.") for name in error.tensors)
