"""The bound of a step's activations, compared with what torch's allocator held on the CPU.

The attention is as the engine's is there: keys and values lie in slots, a group of heads is folded
into the query axis, and a mask says what a token sees.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING
from transformers import AttentionInterface
from transformers import AttentionMaskInterface
from transformers import AutoModelForCausalLM

from service.engine import scoring
from service.engine.params import SamplingParams
from service.engine.scheduler import Piece
from service.engine.sequence import Sequence
from service.engine.sequence import Stream
from service.placement import activations
from service.placement import kv
from service.placement.kv import STEP_TOKENS
from tests.support.peaks import peak_bytes

TOKENS = STEP_TOKENS["cpu"]
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 16},
    "phi3": {},
    "phi": {"num_key_value_heads": 8},
    "gpt_neox": {"num_key_value_heads": 8},
    "gpt2": {"num_key_value_heads": 8, "n_inner": 512},
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {
        "num_experts": 16,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 128,
        "head_dim": 16,
    },
    "deepseek_v3": LATENT,
}


class _Slots:
    """Keys and values of one sequence, `context` tokens a layer, made when first asked for."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        tokens, heads, groups = query.shape[2], key.shape[1], query.shape[1] // key.shape[1]
        if id(module) not in self._slots:
            self._slots[id(module)] = (
                key.new_zeros(1, heads, self._context, key.shape[-1]),
                value.new_zeros(1, heads, self._context, value.shape[-1]),
            )
        keys, values = self._slots[id(module)]
        keys[:, :, -tokens:] = key
        values[:, :, -tokens:] = value
        places = torch.arange(self._context)
        mask = (places[None] <= places[-tokens:, None]).repeat(groups, 1)
        folded = query.reshape(1, heads, groups * tokens, query.shape[-1])
        answer = F.scaled_dot_product_attention(folded, keys, values, mask, scale=scaling)
        answer = answer.reshape(1, heads * groups, tokens, values.shape[-1])
        return answer.transpose(1, 2).contiguous(), None


def measured(arch: str, context: int, dtype: torch.dtype) -> tuple[int, Any]:
    """Peak bytes of a step of TOKENS at the end of `context`, and the config."""
    hf_config = CONFIG_MAPPING[arch](**{**SHAPE, **MODELS[arch]})
    model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()
    AttentionInterface.register("slots", _Slots(context).attention)
    AttentionMaskInterface.register("slots", lambda *args, **kwargs: None)
    model.set_attn_implementation("slots")
    ids = torch.randint(0, 512, (1, TOKENS))
    places = torch.arange(context - TOKENS, context)[None]

    def step() -> object:
        return model(ids, position_ids=places, use_cache=False, logits_to_keep=1)

    with torch.inference_mode():
        step()  # makes the slots
    return peak_bytes(step), hf_config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Every thread has a tile of its own, and the bound is asked for one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("arch", "context"),
    [*((arch, TOKENS) for arch in MODELS), ("llama", 4096), ("deepseek_v3", 2048)],
)
def test_a_step_takes_no_more_than_its_bound_and_not_far_less(
    arch: str, context: int, dtype: torch.dtype
):
    peak, hf_config = measured(arch, context, dtype)
    bound = activations.step_bytes(hf_config, context, 1, dtype.itemsize, on_cuda=False)
    print(f"{arch} {context} {dtype}: measured {peak:,}, bound {bound:,}, {bound / peak:.2f}")
    assert peak <= bound <= 3 * peak


def test_sampling_takes_no_more_than_its_bound():
    """Four rows of logits, softmax, sorted with their places, and summed up, all at once."""
    rows, vocabulary = 4, 50_000
    text = CONFIG_MAPPING["llama"](vocab_size=vocabulary)

    def sample() -> object:
        logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16)
        exact = logits.float()
        probabilities = torch.softmax((exact - exact.amax(-1, keepdim=True)) / 0.7, dim=-1)
        largest, places = torch.sort(probabilities, descending=True)
        return logits, exact, places, largest.cumsum(-1, dtype=torch.float64) < 0.9

    peak = peak_bytes(sample)
    bound = activations.logits_bytes(text, rows, 2, on_cuda=False)
    print(f"sampling: measured {peak:,}, bound {bound:,}, {bound / peak:.2f}")
    assert peak <= bound <= 3 * peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scoring_a_prompt_takes_no_more_than_its_bound(dtype: torch.dtype):
    """Rows of a step's whole share of a prompt, beside one that is sampled from."""
    vocabulary = 50_000
    text = CONFIG_MAPPING["llama"](vocab_size=vocabulary)
    ids = tuple(range(kv.SCORE_TOKENS + 1))
    params = SamplingParams(max_tokens=1, prompt_logprobs=20)

    def score() -> object:
        piece = Piece(Sequence(0, ids, params, Stream(len(ids))), ids, 0, samples=True)
        logits = torch.zeros(len(ids), vocabulary, dtype=dtype)
        scoring.score((piece,), logits[1:])
        return logits

    peak = peak_bytes(score)
    bound = activations.logits_bytes(text, 1, dtype.itemsize, on_cuda=False)
    print(f"scoring: measured {peak:,}, bound {bound:,}, {bound / peak:.2f}")
    assert peak <= bound <= 3 * peak


def test_a_small_deployment_does_not_pay_for_a_whole_step():
    """Two sequences of 16 tokens never fill a step."""
    text = CONFIG_MAPPING["llama"](**SHAPE)
    few = activations.step_bytes(text, 16, 2, 2, on_cuda=True)
    assert few * 10 < activations.step_bytes(text, 1024, 2, 2, on_cuda=True)


def test_on_cuda_no_scores_are_written_out():
    """A context twice as long costs its own keys and values once more, not a chunk's scores."""
    text = CONFIG_MAPPING["llama"](**SHAPE)
    one, two = (
        activations.step_bytes(text, context, 8, 2, on_cuda=True) for context in (100_000, 200_000)
    )
    assert two - one == 100_000 * 2 * 16 * 2 * 2
