"""Which auto class, context and path a model gets, and what an encoder-decoder is planned with."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from service.errors import ModelUnavailable
from service.placement import activations
from service.placement import architectures
from service.placement import footprint
from service.placement import raw_weights
from service.placement import registry
from tests.support.peaks import peak_bytes
from tests.support.planned import GIB
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.planned import write_shape

CONTEXT = 48
T5: dict[str, Any] = {
    "vocab_size": 258,
    "d_model": 64,
    "num_heads": 4,
    "d_kv": 24,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "decoder_start_token_id": 0,
    "dtype": "float32",
}
BART: dict[str, Any] = {
    "vocab_size": 258,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 256,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
MAMBA = {"vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 2}
ANSWERING = {"t5": T5, "bart": BART}


def measured(folder: Path, **changes: Any) -> footprint.Footprint:
    config = model_config(folder, max_context=CONTEXT, **changes)
    return footprint.measure(config, on_cpu=True, native_bfloat16=True)


@pytest.mark.parametrize(
    ("arch", "keys", "expected"),
    [
        ("llama", {}, transformers.AutoModelForCausalLM),
        ("mamba", MAMBA, transformers.AutoModelForCausalLM),
        ("t5", T5, transformers.AutoModelForSeq2SeqLM),
        ("bart", BART, transformers.AutoModelForSeq2SeqLM),
        ("bart", {**BART, "is_encoder_decoder": False}, transformers.AutoModelForCausalLM),
        ("marian", {}, transformers.AutoModelForSeq2SeqLM),
    ],
)
def test_the_config_decides_the_auto_class(
    tmp_path: Path, arch: str, keys: dict[str, Any], expected: Any
) -> None:
    folder = write_shape(tmp_path, arch, **keys)
    assert architectures.auto_class(model_config(folder)) is expected


@pytest.mark.parametrize("arch", ["vit", "whisper", "clip"])
def test_what_is_no_language_model_is_refused_by_name(tmp_path: Path, arch: str) -> None:
    folder = write_shape(tmp_path, arch)
    with pytest.raises(ModelUnavailable, match=f"{arch} is not a language model"):
        architectures.auto_class(model_config(folder))


@pytest.mark.parametrize(
    ("arch", "keys", "limit"),
    [
        ("t5", T5, None),
        ("t5", {**T5, "n_positions": 512}, 512),
        ("bart", BART, 64),
        ("gpt2", {"n_positions": 77}, 77),
        ("mamba", MAMBA, None),
    ],
)
def test_the_context_is_limited_where_the_config_says_so(
    arch: str, keys: dict[str, Any], limit: int | None
) -> None:
    assert architectures.context_limit(CONFIG_MAPPING[arch](**keys)) == limit


@pytest.mark.parametrize(
    ("arch", "keys", "why"),
    [
        ("t5", T5, "it is an encoder-decoder"),
        ("mamba", MAMBA, "it has a recurrent state"),
        ("rwkv", {}, "it has a recurrent state"),
        ("qwen3_next", {}, "it has a recurrent state"),
        ("llama", {}, ""),
        ("bloom", {}, ""),
    ],
)
def test_the_path_is_told_where_the_config_settles_it(
    arch: str, keys: dict[str, Any], why: str
) -> None:
    assert architectures.plain_path(CONFIG_MAPPING[arch](**keys)) == why


# --- an encoder-decoder's plan


@pytest.mark.parametrize("arch", ANSWERING)
def test_the_planned_kv_is_what_transformers_keeps_of_a_whole_context(
    tmp_path: Path, arch: str
) -> None:
    """Its own tokens and the prompt's, in every decoder layer."""
    found = measured(write_shape(tmp_path, arch, **ANSWERING[arch]), max_sequences=3)
    model = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[arch](**ANSWERING[arch])).eval()
    ids = torch.ones(1, CONTEXT, dtype=torch.int64)
    with torch.inference_mode():
        cache = model(input_ids=ids, decoder_input_ids=ids).past_key_values
    kept = [
        part.layers[index].keys.nbytes + part.layers[index].values.nbytes
        for part in (cache.self_attention_cache, cache.cross_attention_cache)
        for index in range(len(part.layers))
    ]
    assert found.kv == 3 * sum(kept)
    layers = [unit.name for unit in found.units if unit.kv]
    assert len(layers) == len(kept) // 2
    assert all("decoder" in name for name in layers)


@pytest.mark.parametrize("arch", ANSWERING)
def test_the_planned_weights_are_the_models(tmp_path: Path, arch: str) -> None:
    found = measured(write_shape(tmp_path, arch, **ANSWERING[arch]))
    model = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[arch](**ANSWERING[arch]))
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert found.weights == sum(tensors.values())


@pytest.mark.parametrize("arch", ANSWERING)
def test_the_activations_of_the_longest_prompt_are_within_the_bound(arch: str) -> None:
    keys = {**ANSWERING[arch], "max_position_embeddings": 1024}
    hf_config = CONFIG_MAPPING[arch](**keys)
    model = AutoModelForSeq2SeqLM.from_config(hf_config).eval()
    context = 768
    ids = torch.ones(1, context, dtype=torch.int64)
    begun = torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        peak = peak_bytes(lambda: model(input_ids=ids, decoder_input_ids=begun))
    bound = activations.step_bytes(hf_config, context, 1, 4, on_cuda=False, whole_prompts=True)
    assert 0.2 * bound < peak <= bound or (arch == "bart" and peak <= bound)


@pytest.mark.parametrize("strategy", ["cpu", "auto-shard", "single-gpu", "four-bit"])
def test_every_built_in_strategy_plans_an_encoder_decoder(tmp_path: Path, strategy: str) -> None:
    folder = write_shape(tmp_path, "t5", **T5)
    machine = ram(8 * GIB) if strategy == "cpu" else cards(24 * GIB, 24 * GIB)
    chosen = registry.build().select(strategy)
    config = model_config(folder, strategy=strategy)
    made = chosen.plan(registry.settle(config, chosen, {}), machine)
    assert any("plain engine path: it is an encoder-decoder" in note for note in made.notes)
    assert sum(memory.kv for memory in made.memory.values()) > 0


def test_a_plan_does_not_speak_of_a_path_that_loading_decides(tmp_path: Path) -> None:
    folder = write_shape(tmp_path, "llama", hidden_size=64, num_hidden_layers=2)
    chosen = registry.build().select("cpu")
    config = model_config(folder, strategy="cpu")
    made = chosen.plan(registry.settle(config, chosen, {}), ram(8 * GIB))
    assert not any("path" in note for note in made.notes)


# --- weights that are read past their layer


@pytest.mark.parametrize(
    ("arch", "keys", "expected"),
    [
        ("mamba", MAMBA, {"dt_proj", "lm_head"}),
        ("t5", T5, {"wo"}),
        ("llama", {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32}, set()),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_linears_whose_weight_the_model_reads_itself_are_found(
    tmp_path: Path, arch: str, keys: dict[str, Any], expected: set[str], training: bool
) -> None:
    config = model_config(write_shape(tmp_path, arch, **keys))
    model = footprint.skeleton(config, footprint.read_config(config), torch.float32)
    model.train(training)
    linears = [name for name, m in model.named_modules() if type(m) is torch.nn.Linear]
    found = raw_weights.read_past(model, linears)
    assert {name.rpartition(".")[2] for name in found} == expected
    assert model.training is training
    assert [n for n, m in model.named_modules() if type(m) is torch.nn.Linear] == linears


def test_where_the_model_cannot_be_run_all_that_its_code_reads_is_left_alone() -> None:
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA))
    linears = [name for name, m in model.named_modules() if type(m) is torch.nn.Linear]

    def refuse(**given: Any) -> Any:
        raise RuntimeError("not here")

    model.forward = refuse  # type: ignore[method-assign]
    found = {name.rpartition(".")[2] for name in raw_weights.read_past(model, linears)}
    assert found == {"dt_proj", "x_proj", "out_proj", "lm_head"}
