"""F15: the checkpoint's tensors are not the model's; F16: they are, and their values are bad."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.errors import PlacementMismatch
from service.placement.certificate import certify
from service.testing.self_test.values import TENSOR
from service.testing.self_test.values import edit
from service.testing.self_test.values import missing
from tests.support.placing import IDS
from tests.support.placing import bring_up
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny

Edit = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Edit], Path]:
    """A model folder whose tensors a test may change."""

    def edited(change: Edit) -> Path:
        return edit(save_tiny(tmp_path / "model", "llama", tie=False), change)

    return edited


def unexpected(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(64, 128)


def mismatched(tensors: dict[str, torch.Tensor]) -> None:
    tensors[TENSOR] = torch.zeros(64, 100)


def damaged(tensors: dict[str, torch.Tensor]) -> None:
    tensors[TENSOR][3, 5] = float("nan")


def test_plain_a_missing_tensor_is_a_table_in_the_log_and_then_random(
    edited: Callable[[Edit], Path],
) -> None:
    """Fails when `from_pretrained` refuses an incomplete checkpoint."""
    folder = edited(missing)
    models = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
    first, second = (model.get_parameter(TENSOR) for model in models)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, second)
    assert not torch.allclose(logits(models[0]), logits(models[1]))


def test_plain_more_layers_in_the_config_than_in_the_file_are_random(
    edited: Callable[[Edit], Path],
) -> None:
    """Fails as the one above."""
    folder = edited(lambda tensors: None)
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=3)
    assert len(model.model.layers) == 3
    assert torch.isfinite(logits(model)).all()


def test_plain_an_unexpected_tensor_is_dropped(edited: Callable[[Edit], Path]) -> None:
    """Fails when `from_pretrained` refuses what it does not know."""
    model = AutoModelForCausalLM.from_pretrained(edited(unexpected))
    assert len(model.model.layers) == 2
    assert torch.isfinite(logits(model)).all()


def test_plain_a_mismatched_tensor_is_random_when_asked_not_to_look(
    edited: Callable[[Edit], Path],
) -> None:
    """Fails when `ignore_mismatched_sizes` goes. Without it the error does not name the tensor."""
    folder = edited(mismatched)
    model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.get_parameter(TENSOR).shape == (64, 128)
    with pytest.raises(RuntimeError, match="details look at the above report") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert TENSOR not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "tensor", "message"),
    [
        (missing, TENSOR, "1 tensor is missing in the checkpoint and would be random"),
        (
            unexpected,
            "model.layers.2.mlp.down_proj.weight",
            "1 tensor is unexpected in the checkpoint and would be dropped",
        ),
        (
            mismatched,
            TENSOR,
            "1 tensor is mismatched in shape in the checkpoint and would be random",
        ),
    ],
)
def test_ours_refuses_and_names_the_tensor(
    edited: Callable[[Edit], Path], change: Edit, tensor: str, message: str
) -> None:
    with pytest.raises(PlacementMismatch) as caught:
        bring_up(edited(change))
    error = caught.value
    assert error.failure_class == "F15"
    assert error.tensors == (tensor,)
    assert error.message == f"{message}: {tensor} (F15)"
    assert error.hint == "the files do not belong to this config.json; fetch the model again"


def test_ours_names_some_and_counts_the_rest(edited: Callable[[Edit], Path]) -> None:
    def without_a_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    with pytest.raises(PlacementMismatch, match=r"9 tensors are missing .* and 6 more \(F15\)"):
        bring_up(edited(without_a_layer))


def test_a_strategy_cannot_hide_it_by_its_own_arguments(edited: Callable[[Edit], Path]) -> None:
    strategy = variant(
        load=lambda config, placement: AutoModelForCausalLM.from_pretrained(
            config.folder, ignore_mismatched_sizes=True
        )
    )
    with pytest.raises(PlacementMismatch, match=f"mismatched in shape .*{TENSOR}"):
        bring_up(edited(mismatched), strategy)


def test_what_is_allowed_by_name_passes(edited: Callable[[Edit], Path]) -> None:
    from dataclasses import replace

    from tests.support.placing import planned

    folder = edited(unexpected)
    plan = replace(planned(folder), allows=frozenset({"model.layers.2.mlp.down_proj.weight"}))
    certificate = certify(bring_up(folder, variant(plan=lambda config, hardware: plan)))
    assert certificate.valid, certificate.failure()


# --- F16, as far as a forward shows it


def test_plain_damaged_weights_generate_as_if_nothing_were(edited: Callable[[Edit], Path]) -> None:
    """Fails when `from_pretrained` or `generate` looks at values."""
    model = AutoModelForCausalLM.from_pretrained(edited(damaged))
    answer = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > IDS.shape[1]


def test_ours_refuses_damaged_weights(edited: Callable[[Edit], Path]) -> None:
    folder = edited(damaged)
    error = refusal(certify(bring_up(folder)))
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F16"
    assert error.message.startswith("the first forward gives NaN or infinite logits")
    assert error.hint is not None
    assert "checksums" in error.hint
    assert not judged(AutoModelForCausalLM.from_pretrained(folder), folder).valid
