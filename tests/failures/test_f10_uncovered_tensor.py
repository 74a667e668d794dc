"""F10: a device map that leaves tensors out, or names what is not there."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from service.errors import PlacementMismatch
from service.placement import planning
from service.placement.certificate import certify
from service.testing.self_test.maps import INCOMPLETE
from service.testing.self_test.maps import planned_by_names
from tests.support.placing import IDS
from tests.support.placing import ROOMY
from tests.support.placing import bring_up
from tests.support.placing import config_of
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False)


def test_plain_transformers_takes_an_incomplete_map_in_silence(folder: Path) -> None:
    """Fails when `from_pretrained` checks that a map covers the model on one device too."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=INCOMPLETE)
    assert logits(model).shape[:2] == IDS.shape


def test_plain_accelerate_warns_of_a_typo_and_dies_without_naming_it(folder: Path) -> None:
    """Fails when a map's unknown key is refused, or the error names it."""
    typo = {"": "cpu", "model.embed_token": "disk"}
    with (
        pytest.warns(UserWarning, match="do not match any submodules"),
        pytest.raises(ValueError, match="weight is on the meta device, we need a `value`"),
    ):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map=typo, offload_folder=folder.parent / "offload"
        )


def test_plain_accelerate_names_what_is_left_out_where_there_are_several_devices(
    folder: Path,
) -> None:
    """The one case that is told well. Fails when it is not told any more."""
    words = "The device_map provided does not give any device for the following parameters: model.l"
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={**INCOMPLETE, "lm_head": "disk"},
            offload_folder=folder.parent / "offload",
        )


def test_ours_refuses_a_map_that_leaves_a_tensor_out_and_names_it(folder: Path) -> None:
    strategy = variant(plan=planned_by_names(INCOMPLETE))
    error = refusal(certify(bring_up(folder, strategy)))
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F10"
    assert error.tensors == ("model.layers.1.self_attn.q_proj.weight",)
    assert "is in no entry of the plan's module map (F10)" in error.message
    assert error.hint == 'add its module, or "" for everything else'


@pytest.mark.parametrize(
    ("places", "tensors", "message"),
    [
        (INCOMPLETE, ("model.layers.1",), "the map has no device for model.layers.1 (F10)"),
        (
            {"": "cpu", "model.embed_token": "disk"},
            ("model.embed_token",),
            "the model has no module model.embed_token to place; did you mean "
            "'model.embed_tokens'? (F10)",
        ),
    ],
)
def test_ours_refuses_both_before_anything_is_read(
    folder: Path, places: dict[str, str], tensors: tuple[str, ...], message: str
) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(PlacementMismatch) as caught:
        planning.mapped(config_of(folder, dtype="float32"), ROOMY, places)
    assert (caught.value.failure_class, caught.value.tensors) == ("F10", tensors)
    assert caught.value.message == message
    assert caught.value.hint is not None
