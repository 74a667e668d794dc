"""What is planned is what a load takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from service.errors import ModelUnavailable
from service.placement import footprint
from service.placement import planning
from service.placement.footprint import Footprint
from service.placement.tensors import nbytes
from service.placement.tensors import scales_of
from tests.support.planned import LLAMA_70B
from tests.support.planned import model_config
from tests.support.planned import write_shape
from tests.support.tiny import SLIDING_WINDOW
from tests.support.tiny import VOCAB
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_config

QUANTIZED = ("Linear4bit", "Linear8bitLt")

# architectures with experts, latent attention and linear attention, as small as they get
ODD: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}


def odd_shape(folder: Path, arch: str, **changes: Any) -> Path:
    keys = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 257,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return write_shape(folder, arch, **{**keys, **ODD[arch], **changes})


def measure(folder: Path, **changes: Any) -> Footprint:
    return footprint.measure(model_config(folder, **changes), on_cpu=True, native_bfloat16=True)


def loaded_bytes(folder: Path, **kwargs: Any) -> tuple[int, int]:
    """Bytes of all tensors of the loaded model, scales included, and its quantised linears."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **kwargs)
    linears = [module for module in model.modules() if type(module).__name__ in QUANTIZED]
    scales = [tensor for module in linears for tensor in scales_of(module)]
    total = sum(nbytes(t) for t in (*model.parameters(), *model.buffers(), *scales))
    return total, len(linears)


# --- weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "phi", "gpt_neox"])
def test_planned_weights_are_those_of_a_load_to_the_byte(
    tmp_path: Path, arch: str, tie: bool, dtype: str
):
    folder = save_tiny(tmp_path / "m", arch, tie=tie, layers=3)
    assert measure(folder, dtype=dtype).weights == loaded_bytes(folder, dtype=dtype)[0]


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_planned_bytes_of_quantised_weights_include_their_scales(
    tmp_path: Path, arch: str, quantize: str
):
    """Absmax per block, its own quantisation and the code tables; not only half a byte a weight."""
    folder = save_tiny(tmp_path / "m", arch, layers=3)
    planned = measure(folder, dtype="float32", quantize=quantize)
    real, linears = loaded_bytes(
        folder, dtype="float32", quantization_config=planning.quantization(quantize, "float32")
    )
    assert planned.quantized == linears > 0
    # exact with today's bitsandbytes; a few bytes a layer may go to another layout of the scales
    assert abs(planned.weights - real) <= 0.03 * real
    assert planned.weights < measure(folder, dtype="float32").weights


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral"])
def test_the_experts_stay_as_they_are_when_bitsandbytes_leaves_them(tmp_path: Path, arch: str):
    """Experts are one stacked parameter, which bitsandbytes does not replace."""
    folder = odd_shape(tmp_path, arch)
    model = AutoModelForCausalLM.from_config(footprint.read_config(model_config(folder)))
    model.save_pretrained(folder)
    planned = measure(folder, dtype="float32", quantize="nf4")
    real, linears = loaded_bytes(
        folder, dtype="float32", quantization_config=planning.quantization("nf4", "float32")
    )
    assert planned.quantized == linears
    assert abs(planned.weights - real) <= 0.03 * real


@pytest.mark.parametrize("arch", ODD)
def test_an_odd_architecture_is_cut_into_its_layers(tmp_path: Path, arch: str):
    found = measure(odd_shape(tmp_path, arch))
    layers = [unit for unit in found.units if unit.name.startswith("model.layers.")]
    assert [unit.name for unit in layers] == [f"model.layers.{i}" for i in range(4)]
    assert {"model.embed_tokens", "lm_head"} <= {unit.name for unit in found.units}


def test_a_70b_model_has_the_parameters_it_is_named_after(tmp_path: Path):
    found = measure(write_shape(tmp_path, **LLAMA_70B), dtype="bfloat16")
    assert found.parameters == 70_553_706_496
    # all of them in two bytes, and one buffer: 64 inverse frequencies in float32, kept twice
    assert found.weights == 2 * found.parameters + 2 * 64 * 4


def test_no_weights_are_read_and_no_file_is_written(tmp_path: Path):
    folder = write_shape(tmp_path / "m", **LLAMA_70B)
    measure(folder, quantize="nf4")
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "config.json"]


def test_a_sharded_checkpoint_is_planned_as_a_whole_one(tmp_path: Path):
    """Its dtype too is read from the headers of all its files, when config.json has none."""
    whole = save_tiny(tmp_path / "whole", "llama", layers=3, dtype=torch.bfloat16)
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    words = json.loads((folder / "config.json").read_text())
    del words["dtype"]
    (folder / "config.json").write_text(json.dumps(words))
    found = measure(folder)
    assert (found.dtype, found.weights) == ("bfloat16", measure(whole).weights)
    assert found.weights == loaded_bytes(folder, dtype="bfloat16")[0]


def test_units_follow_the_order_of_the_model_and_a_tied_head_weighs_nothing(tmp_path: Path):
    found = measure(save_tiny(tmp_path, "llama", tie=True))
    assert [unit.name for unit in found.units] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    assert found.ties == {"lm_head": "model.embed_tokens"}
    assert found.units[-1].weights == 0


# --- KV


def test_kv_counts_heads_of_keys_and_values_not_of_queries(tmp_path: Path):
    """2 KV heads of 16, key and value, float32, 3 layers; 4 query heads play no part."""
    found = measure(save_tiny(tmp_path, "llama", layers=3), max_context=100, max_sequences=5)
    assert found.kv_bytes_per_token == 2 * 16 * 2 * 4 * 3
    assert found.kv_tokens == 500
    assert found.kv == 500 * found.kv_bytes_per_token


def test_gpt2_without_kv_heads_in_its_config_has_as_many_as_heads(tmp_path: Path):
    found = measure(save_tiny(tmp_path, "gpt2", layers=3))
    assert found.kv_bytes_per_token == 4 * 16 * 2 * 4 * 3


@pytest.mark.parametrize(("arch", "sliding"), [("mistral", 4), ("gemma2", 2)])
def test_a_sliding_window_layer_keeps_its_window_only(tmp_path: Path, arch: str, sliding: int):
    """Every layer of mistral slides, every second one of gemma2."""
    found = measure(save_tiny(tmp_path, arch, layers=4), max_context=100, max_sequences=3)
    token = 2 * 16 * 2 * 4
    tokens = sliding * SLIDING_WINDOW + (4 - sliding) * 100
    assert found.kv == token * 3 * tokens
    assert found.kv_bytes_per_token == 4 * token


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi", "gpt_neox", "qwen3"])
def test_kv_is_what_the_models_own_cache_holds(tmp_path: Path, arch: str):
    folder = save_tiny(tmp_path, arch)
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.arange(10)[None], past_key_values=cache, use_cache=True)
    held = sum(nbytes(layer.keys) + nbytes(layer.values) for layer in cache.layers)
    assert held == 10 * measure(folder).kv_bytes_per_token


def test_latent_attention_is_reserved_expanded_and_compared_with_what_transformers_caches(
    tmp_path: Path,
):
    folder = odd_shape(tmp_path, "deepseek_v3")
    model = AutoModelForCausalLM.from_config(footprint.read_config(model_config(folder)))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.arange(10)[None], past_key_values=cache, use_cache=True)
    held = sum(nbytes(layer.keys) + nbytes(layer.values) for layer in cache.layers)
    found = measure(folder)
    assert found.kv_bytes_per_token == 4 * (16 + 8 + 24) * 4 * 4
    assert 10 * found.kv_bytes_per_token == held * found.latent


def test_linear_attention_layers_keep_a_state_that_does_not_grow_with_the_context(tmp_path: Path):
    """Three of four layers of qwen3_next have one."""
    folder = odd_shape(tmp_path, "qwen3_next")
    short, long = measure(folder, max_context=16), measure(folder, max_context=64)
    kept = zip(short.units, long.units, strict=True)
    grown = [a.name for a, b in kept if b.kv > a.kv]
    assert grown == ["model.layers.3"]
    assert all(unit.kv for unit in long.units if unit.name.startswith("model.layers."))


def test_the_context_is_at_most_the_models_own(tmp_path: Path):
    found = measure(save_tiny(tmp_path, "llama"), max_context=100_000)
    assert found.context == 512


# --- dtype


@pytest.mark.parametrize(
    ("stored", "on_cpu", "native", "expected"),
    [
        (torch.float32, True, True, "float32"),
        (torch.bfloat16, True, True, "bfloat16"),
        (torch.bfloat16, True, False, "float32"),
        (torch.float16, True, True, "bfloat16"),
        (torch.float16, False, False, "float16"),
        (torch.bfloat16, False, False, "bfloat16"),
    ],
)
def test_auto_is_the_checkpoints_dtype_where_the_device_computes_with_it(
    tmp_path: Path, stored: torch.dtype, on_cpu: bool, native: bool, expected: str
):
    tiny_config("llama", dtype=stored).save_pretrained(tmp_path)
    config = model_config(tmp_path)
    assert footprint.measure(config, on_cpu=on_cpu, native_bfloat16=native).dtype == expected


def test_a_config_that_names_no_dtype_has_that_of_its_files(tmp_path: Path):
    folder = save_tiny(tmp_path, "llama", dtype=torch.bfloat16)
    words = json.loads((folder / "config.json").read_text())
    del words["dtype"]
    (folder / "config.json").write_text(json.dumps(words))
    assert measure(folder).dtype == "bfloat16"


def test_tensors_that_transformers_keeps_in_float32_are_counted_so(tmp_path: Path):
    """DeepSeek-V3's expert bias: `_keep_in_fp32_modules_strict`."""
    folder = odd_shape(tmp_path, "deepseek_v3")
    model = AutoModelForCausalLM.from_config(footprint.read_config(model_config(folder)))
    model.to(torch.bfloat16).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    held = sum(nbytes(t) for t in (*loaded.parameters(), *loaded.buffers()))
    bias = loaded.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert measure(folder, dtype="bfloat16").weights == held


# --- refusals


def test_a_broken_config_names_the_model(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(ModelUnavailable, match=r"tiny: its config\.json cannot be read"):
        measure(tmp_path)


def test_a_model_that_does_not_continue_text_is_refused(tmp_path: Path):
    write_shape(tmp_path, "vit")
    with pytest.raises(ModelUnavailable, match="vit is not a language model"):
        measure(tmp_path)


def test_a_checkpoint_that_is_already_quantised_is_refused(tmp_path: Path):
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailable, match="already quantised \\(gptq\\)"):
        measure(tmp_path)


def test_layers_that_are_not_found_are_refused_rather_than_planned_without_kv(tmp_path: Path):
    """Of a Bart that is only a decoder the config still says num_hidden_layers of the encoder."""
    shape = {"encoder_layers": 3, "decoder_layers": 2, "d_model": 64}
    write_shape(tmp_path, "bart", is_encoder_decoder=False, **shape)
    with pytest.raises(ModelUnavailable, match="3 layers of bart were not found"):
        measure(tmp_path)
