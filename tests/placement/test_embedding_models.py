"""A model that gives embeddings: told from its files, planned without KV, loaded without a head."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from service.errors import ModelUnavailable
from service.placement import activations
from service.placement import architectures
from service.placement import certificate
from service.placement import footprint
from service.placement import registry
from tests.support.encoders import POSITIONS
from tests.support.encoders import encoder_config
from tests.support.encoders import save_encoder
from tests.support.encoders import tiny_encoder
from tests.support.encoders import write_steps
from tests.support.peaks import peak_bytes
from tests.support.planned import GIB
from tests.support.planned import bring_up
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.planned import write_shape

ENCODERS = ["bert", "distilbert", "roberta", "mpnet", "albert", "modernbert", "deberta-v2"]


def class_of(folder: Path) -> Any:
    return architectures.auto_class(model_config(folder))


@pytest.mark.parametrize("arch", [*ENCODERS, "xlm-roberta", "electra", "camembert", "nomic_bert"])
def test_an_encoder_gives_embeddings(tmp_path: Path, arch: str) -> None:
    assert class_of(write_shape(tmp_path, arch)) is transformers.AutoModel


@pytest.mark.parametrize(
    ("arch", "keys"),
    [("bert", {"is_decoder": True}), ("llama", {}), ("xlm", {"causal": True})],
)
def test_a_model_that_continues_text_does_not(
    tmp_path: Path, arch: str, keys: dict[str, Any]
) -> None:
    assert class_of(write_shape(tmp_path, arch, **keys)) is transformers.AutoModelForCausalLM


def test_a_decoder_of_sentence_transformers_does(tmp_path: Path) -> None:
    write_steps(write_shape(tmp_path, "qwen3"))
    assert class_of(tmp_path) is transformers.AutoModel


def test_an_encoder_decoder_of_sentence_transformers_is_refused(tmp_path: Path) -> None:
    write_steps(write_shape(tmp_path, "t5"))
    with pytest.raises(ModelUnavailable, match="gives embeddings, and t5 is not"):
        class_of(tmp_path)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("bert", POSITIONS), ("roberta", POSITIONS - 2), ("mpnet", POSITIONS - 2)],
)
def test_positions_that_are_counted_behind_the_padding_id_are_fewer(
    arch: str, expected: int
) -> None:
    """One more than these reads outside the table."""
    model = tiny_encoder(arch)
    assert architectures.positions_of(model) == expected
    with torch.inference_mode():
        model(input_ids=torch.full((1, expected), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 5))


@pytest.mark.parametrize(
    ("asked", "length", "expected"), [(64, None, 64), (4096, None, 128), (4096, 40, 40)]
)
def test_the_context_is_the_least_of_all_limits(
    tmp_path: Path, asked: int, length: int | None, expected: int
) -> None:
    folder = save_encoder(tmp_path / "m", "roberta", length=length)
    config = model_config(folder, max_context=asked)
    found = footprint.measure(config, on_cpu=True, native_bfloat16=True)
    assert found.context == expected


@pytest.mark.parametrize("arch", ENCODERS)
def test_the_planned_weights_are_the_models_and_no_kv_is_kept(tmp_path: Path, arch: str) -> None:
    encoder_config(arch).save_pretrained(tmp_path)
    found = footprint.measure(model_config(tmp_path), on_cpu=True, native_bfloat16=True)
    model = tiny_encoder(arch)
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert found.weights == sum(tensors.values())
    assert (found.kv, found.kv_tokens, found.logits) == (0, 0, 0)


@pytest.mark.parametrize("arch", ["bert", "distilbert", "mpnet", "modernbert", "deberta-v2"])
@pytest.mark.parametrize(("texts", "tokens"), [(1, 768), (12, 42)])
def test_the_activations_of_a_forward_are_within_the_bound(
    arch: str, texts: int, tokens: int
) -> None:
    model = tiny_encoder(arch, max_position_embeddings=1024)
    ids = torch.full((texts, tokens), 5)
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    peak = peak_bytes(lambda: model(input_ids=ids, attention_mask=mask))
    bound = activations.embedding_bytes(
        model.config.get_text_config(),
        768,
        12,
        4,
        on_cuda=False,
        threads=torch.get_num_threads(),
        fused=bool(model._supports_sdpa),
    )
    assert peak <= bound


@pytest.mark.parametrize("strategy", ["cpu", "auto-shard", "single-gpu"])
def test_every_built_in_strategy_plans_one(tmp_path: Path, strategy: str) -> None:
    folder = save_encoder(tmp_path / "m")
    machine = ram(8 * GIB) if strategy == "cpu" else cards(24 * GIB, 24 * GIB)
    chosen = registry.build().select(strategy)
    config = model_config(folder, strategy=strategy)
    made = chosen.plan(registry.settle(config, chosen, {}), machine)
    assert sum(memory.kv for memory in made.memory.values()) == 0
    assert made.kv_tokens == 0
    assert not any("kv_tokens" in note or "modules.json" in note for note in made.notes)


def test_a_folder_that_does_not_say_how_is_planned_with_a_note(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "m", pooling=None)
    chosen = registry.build().select("cpu")
    made = chosen.plan(registry.settle(model_config(folder), chosen, {}), ram(8 * GIB))
    assert any("no modules.json" in note and "length 1" in note for note in made.notes)


@pytest.mark.parametrize(
    ("strategy", "quantize"),
    [("cpu", "none"), ("cpu", "int8"), ("auto-shard", "none"), ("four-bit", "nf4")],
)
@pytest.mark.parametrize("arch", ["bert", "distilbert", "mpnet", "modernbert", "qwen3"])
def test_it_is_loaded_as_planned_and_certified(
    tmp_path: Path, arch: str, strategy: str, quantize: str
) -> None:
    folder = save_encoder(tmp_path / "m", arch)
    chosen = registry.build().select(strategy)
    config = model_config(folder, strategy=strategy, quantize=quantize)
    loaded = bring_up(chosen, config, ram(8 * GIB))
    made = certificate.certify(loaded)
    assert made.valid, made.failure()
    assert {check.name for check in made.checks} >= {"F15", "F16", "inputs", "forward"}
    if quantize != "nf4":  # its tables are counted for every layer, and some are shared
        assert set(made.plan_errors.values()) == {0}
