"""What is reserved per layer is what transformers hands to the attention function there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers import AttentionMaskInterface
from transformers import AutoModelForCausalLM

from service.placement import footprint
from service.placement.kv import PAGE_TOKENS
from service.placement.kv import STEP_TOKENS
from service.placement.kv import kept_tokens
from service.placement.kv import pool_tokens
from service.placement.kv import running
from tests.placement.test_footprint import odd_shape
from tests.support.planned import model_config
from tests.support.planned import write_shape
from tests.support.tiny import save_tiny

WINDOW = 16
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# what an architecture does with its window: one layer after the other
WINDOWS: dict[str, tuple[str, dict[str, Any], list[int | None]]] = {
    "mistral": ("mistral", {"sliding_window": WINDOW}, [WINDOW] * 4),
    "mistral without": ("mistral", {"sliding_window": None}, [None] * 4),
    "phi3": ("phi3", {"sliding_window": WINDOW}, [WINDOW] * 4),
    "gemma2": (
        "gemma2",
        {"sliding_window": WINDOW, "head_dim": 16},
        [WINDOW, None, WINDOW, None],
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": WINDOW, "head_dim": 16, "sliding_window_pattern": 3},
        [WINDOW, WINDOW, None, WINDOW],
    ),
    "qwen2 with a window it does not use": (
        "qwen2",
        {"sliding_window": WINDOW, "use_sliding_window": False, "max_window_layers": 2},
        [None] * 4,
    ),
    "qwen2": (
        "qwen2",
        {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
        [None, None, WINDOW, WINDOW],
    ),
    "mixtral": ("mixtral", {"sliding_window": WINDOW, "num_local_experts": 2}, [WINDOW] * 4),
    "qwen2_moe, which passes none": (
        "qwen2_moe",
        {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 0,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        [None] * 4,
    ),
}


def handed_over(model: Any) -> list[tuple[int, int | None]]:
    """Per layer: numbers of keys and values of one token, and the `sliding_window` keyword."""
    seen: dict[int, tuple[int, int | None]] = {}

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        numbers = key.shape[1] * (key.shape[-1] + value.shape[-1])
        seen[int(module.layer_idx)] = (numbers, kwargs.get("sliding_window"))  # type: ignore[arg-type]
        heads = query.shape[1]
        return query.new_zeros(1, query.shape[2], heads, value.shape[-1]), None

    AttentionInterface.register("recording", attention)
    AttentionMaskInterface.register("recording", lambda *args, **kwargs: None)
    model.set_attn_implementation("recording")
    with torch.inference_mode():
        model.eval()(torch.arange(8)[None], use_cache=False)
    return [seen[index] for index in sorted(seen)]


def planned(folder: Path) -> list[tuple[int, int | None]]:
    found = footprint.measure(model_config(folder), on_cpu=True, native_bfloat16=True)
    return [(layer.numbers, layer.window) for layer in found.layers if layer.numbers]


def built(folder: Path) -> Any:
    return AutoModelForCausalLM.from_config(footprint.read_config(model_config(folder)))


@pytest.mark.parametrize("name", WINDOWS)
def test_a_layer_slides_where_transformers_passes_a_window(tmp_path: Path, name: str):
    arch, keys, windows = WINDOWS[name]
    folder = write_shape(tmp_path, arch, **{**SHAPE, **keys})
    found = planned(folder)
    assert [window for _, window in found] == windows
    assert found == handed_over(built(folder))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi", "gpt_neox", "qwen3"])
def test_heads_are_counted_as_they_are_handed_over(tmp_path: Path, arch: str):
    folder = save_tiny(tmp_path, arch)
    assert planned(folder) == handed_over(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("arch", ["deepseek_v3", "qwen3_moe", "qwen3_next"])
def test_odd_layers_are_counted_as_they_are_handed_over(tmp_path: Path, arch: str):
    """Latent attention arrives expanded; layers of linear attention never ask for it."""
    folder = odd_shape(tmp_path, arch)
    assert planned(folder) == handed_over(built(folder))


# --- tokens


@pytest.mark.parametrize(
    ("context", "window", "on_cuda", "kept"),
    [
        (100, None, False, 100),
        (100, 30, False, 30),
        (100, 300, False, 100),
        (100, None, True, 128),
        (128, None, True, 128),
        (100, 30, True, 128),  # no more than the whole context
        (100_000, 4096, True, 4096 + 2048 + 64),
        (100_000, 4097, True, 4096 + 2048 + 2 * 64),
    ],
)
def test_a_slot_is_exact_and_pages_are_whole(
    context: int, window: int | None, on_cuda: bool, kept: int
):
    assert kept_tokens(context, window, on_cuda=on_cuda) == kept


@pytest.mark.parametrize("context", [1, 63, 64, 65, 1000, 9000])
@pytest.mark.parametrize("window", [1, 63, 64, 65, 5000])
def test_a_window_has_enough_pages_wherever_it_starts(context: int, window: int):
    """While a step writes its last token, the first one of the step still sees its window."""
    step = STEP_TOKENS["cuda"]
    kept = kept_tokens(context, window, on_cuda=True) // PAGE_TOKENS
    for last in range(min(window + step, context) - 1, context, 61):
        first = max(0, last - (window + step) + 1)
        assert last // PAGE_TOKENS - first // PAGE_TOKENS + 1 <= kept


def test_a_pool_has_a_scratch_page_on_cuda_only():
    assert pool_tokens(400, 100, 4, None, on_cuda=False) == 400
    assert pool_tokens(400, 100, 4, None, on_cuda=True) == 4 * 128 + PAGE_TOKENS


def test_a_smaller_budget_is_shared_pages_on_cuda_and_fewer_slots_on_the_cpu():
    assert pool_tokens(250, 100, 4, None, on_cuda=True) == 4 * 64 + PAGE_TOKENS
    assert pool_tokens(250, 100, 4, None, on_cuda=False) == 200
    assert running(250, 100, 4, on_cuda=False) == 2
    assert running(250, 100, 4, on_cuda=True) == 4


def test_a_budget_in_tokens_is_what_the_plan_reserves(tmp_path: Path):
    folder = save_tiny(tmp_path, "llama", layers=3)
    token = 2 * 16 * 2 * 4 * 3

    def kv(on_cpu: bool, **keys: Any) -> Mapping[str, int]:
        config = model_config(folder, max_context=100, max_sequences=5, dtype="float32", **keys)
        found = footprint.measure(config, on_cpu=on_cpu, native_bfloat16=True)
        return {"tokens": found.kv_tokens, "bytes": found.kv}

    assert kv(True) == {"tokens": 500, "bytes": 500 * token}
    assert kv(True, kv_tokens=350) == {"tokens": 350, "bytes": 300 * token}
    assert kv(True, kv_tokens=9999) == {"tokens": 500, "bytes": 500 * token}
    assert kv(False) == {"tokens": 500, "bytes": (5 * 128 + 64) * token}
    assert kv(False, kv_tokens=350) == {"tokens": 350, "bytes": (6 * 64 + 64) * token}


def test_a_budget_is_no_less_than_the_context_of_one_sequence(tmp_path: Path):
    """The model's own limit may be lower than max_context; the budget is compared with that."""
    folder = save_tiny(tmp_path, "llama")
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 512
    config = model_config(folder, max_context=1000, max_sequences=4, kv_tokens=1000)
    found = footprint.measure(config, on_cpu=True, native_bfloat16=True)
    assert (found.context, found.kv_tokens) == (512, 1000)
    assert found.kv == 512 * found.kv_bytes_per_token
