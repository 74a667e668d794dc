"""Files of an encoder with the head that it was trained with serve embeddings; no others differ."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file

from service.errors import PlacementMismatch
from service.placement import certificate
from service.placement import registry
from service.placement.loading import Loaded
from tests.support.encoders import save_encoder
from tests.support.encoders import save_headed
from tests.support.planned import GIB
from tests.support.planned import bring_up
from tests.support.planned import model_config
from tests.support.planned import ram

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def loaded_from(folder: Path, strategy: str = "cpu", **changes: Any) -> Loaded:
    chosen = registry.build().select(strategy)
    return bring_up(chosen, model_config(folder, strategy=strategy, **changes), ram(8 * GIB))


def edited(folder: Path, **tensors: "torch.Tensor | None") -> None:
    """Put tensors into the file under names with __ for dots; None takes one out."""
    path = folder / "model.safetensors"
    found = load_file(path)
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        found = {k: v for k, v in found.items() if k != key}
        found |= {} if tensor is None else {key: tensor}
    save_file(found, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        ("bert", "masked"),
        ("bert", "pretraining"),
        ("distilbert", "masked"),
        ("roberta", "masked"),
        ("mpnet", "masked"),
        ("albert", "masked"),
        ("modernbert", "masked"),
        ("electra", "pretraining"),
        ("deberta-v2", "masked"),
    ],
)
def test_an_encoder_with_its_head_is_loaded_without_it_and_certified(
    tmp_path: Path, arch: str, head: str
) -> None:
    model = save_headed(tmp_path / "m", arch, head)
    loaded = loaded_from(tmp_path / "m")
    made = certificate.certify(loaded)
    assert made.valid, made.failure()
    (sampled,) = (check.checked for check in made.checks if check.name == "F16")
    assert sampled >= len(list(model.base_model.parameters()))
    with torch.inference_mode():
        expected = model.base_model(input_ids=IDS).last_hidden_state
        assert torch.equal(loaded.model(input_ids=IDS).last_hidden_state, expected)
    told = " ".join(loaded.notes)
    prefix = f"{model.base_model_prefix}."
    stored = load_file(tmp_path / "m" / "model.safetensors")
    heads = [name for name in stored if not name.startswith(prefix)]
    assert heads
    for name in heads:
        assert name in told


def test_a_pooler_that_the_files_lack_is_told_and_one_that_they_have_is_loaded(
    tmp_path: Path,
) -> None:
    save_headed(tmp_path / "masked", "bert")
    assert "they are random: pooler.dense.bias, pooler.dense.weight." in " ".join(
        loaded_from(tmp_path / "masked").notes
    )
    model = save_headed(tmp_path / "both", "bert", "pretraining")
    loaded = loaded_from(tmp_path / "both")
    assert "random" not in " ".join(loaded.notes)
    assert torch.equal(loaded.model.pooler.dense.weight, model.base_model.pooler.dense.weight)


def test_the_files_of_bert_base_uncased_have_more_heads_than_their_class_and_old_names(
    tmp_path: Path,
) -> None:
    """A masked LM as its config.json declares it, with the weights of all its pretraining."""
    folder = tmp_path / "m"
    save_headed(folder, "bert", "pretraining")
    found = load_file(folder / "model.safetensors")
    found["cls.predictions.decoder.weight"] = found[
        "bert.embeddings.word_embeddings.weight"
    ].clone()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in found.items()
    }
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = loaded_from(folder)
    made = certificate.certify(loaded)
    assert made.valid, made.failure()
    for name in ("cls.seq_relationship.weight", "cls.predictions.decoder.weight"):
        assert name in " ".join(loaded.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cls__adapter__weight": torch.ones(3)}, "unexpected in the checkpoint.*cls.adapter"),
        ({"bert__extra__weight": torch.ones(3)}, "unexpected in the checkpoint.*bert.extra"),
        (
            {"bert__encoder__layer__1__output__dense__weight": None},
            r"missing in the checkpoint.*encoder\.layer\.1\.output\.dense\.weight",
        ),
    ],
)
def test_any_other_tensor_too_many_or_too_few_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    save_headed(tmp_path / "m", "bert")
    edited(tmp_path / "m", **change)
    with pytest.raises(PlacementMismatch, match=words) as caught:
        loaded_from(tmp_path / "m")
    assert "(F15)" in caught.value.message
    assert "cls.predictions" not in caught.value.message
    assert "pooler" not in caught.value.message


def test_a_head_that_the_config_does_not_declare_is_refused(tmp_path: Path) -> None:
    save_headed(tmp_path / "m", "bert")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlacementMismatch, match=r"(F15)"):
        loaded_from(tmp_path / "m")


def test_a_model_without_a_head_must_have_its_pooler(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m", "bert")
    edited(tmp_path / "m", pooler__dense__weight=None)
    with pytest.raises(PlacementMismatch, match=r"missing in .*pooler\.dense\.weight"):
        loaded_from(tmp_path / "m")


def test_a_quantised_one_is_certified(tmp_path: Path) -> None:
    save_headed(tmp_path / "m", "bert", "pretraining")
    made = certificate.certify(loaded_from(tmp_path / "m", "four-bit", quantize="nf4"))
    assert made.valid, made.failure()
