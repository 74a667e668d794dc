"""What one step of the engine needs beside weights and KV, as upper bounds in bytes.

The coefficients are those of the widest moment of a layer, counted from transformers' models and
measured by tests/placement/test_activations.py. A step has two: inside attention and inside the
MLP; the larger counts, because the first is freed before the second.
"""

from typing import Any

from service.placement.kv import SCORE_ROWS
from service.placement.kv import SCORE_TOKENS
from service.placement.kv import STEP_TOKENS
from service.placement.kv_layers import latent_numbers
from service.placement.kv_layers import numbers_per_token

# bytes per vocabulary entry and row: float32 logits, scaled, probabilities, sorted twice over with
# their 8-byte places, and a running sum in 8 bytes
SAMPLING = 40
# of a prompt's logprobs: picked, float32, and what a sum of exponentials and a top-k take
SCORING = 16
# PyTorch's flash attention on the CPU works on tiles: 256 x 512 float32, and again in the dtype
TILES = 2**20


def step_bytes(
    text: Any,
    context: int,
    sequences: int,
    itemsize: int,
    *,
    on_cuda: bool,
    threads: int = 1,
    whole_prompts: bool = False,
) -> int:
    """Most bytes of the states of one step, logits apart.

    text is transformers' text config, itemsize that of the computing dtype. A step has at most
    STEP_TOKENS tokens, of one long prompt or of several sequences. threads matter on the CPU only.
    whole_prompts: the engine does not cut the prompts of this model.
    """
    if whole_prompts:
        return _whole(text, context, sequences, itemsize, threads)
    if not hasattr(text, "num_attention_heads"):
        return _scan(text, context, itemsize)
    tokens = min(STEP_TOKENS["cuda" if on_cuda else "cpu"], context * sequences)
    attention = tokens * _attention_width(text) * itemsize
    if on_cuda:
        attention += _gathered(text, context, itemsize)
    else:
        attention += _masked(text, tokens, context, itemsize) + threads * TILES
    mlp = tokens * (_mlp_width(text) * itemsize + 16 * _experts(text))
    return int(max(attention, mlp))


def embedding_bytes(
    text: Any,
    context: int,
    sequences: int,
    itemsize: int,
    *,
    on_cuda: bool,
    threads: int,
    fused: bool,
) -> int:
    """Most bytes of one forward of a model that gives embeddings, whose texts are not cut.

    A forward has STEP_TOKENS tokens with their padding, or one text that is longer. fused: its
    attention is PyTorch's, which writes no scores out, but a mask in the dtype; else scores of all
    heads are written out, some of them in float32. Hidden states are pooled in float32.
    """
    tokens = min(max(STEP_TOKENS["cuda" if on_cuda else "cpu"], context), context * sequences)
    scores = tokens * context
    masks = scores * (1 + 2 * itemsize)
    if any("sliding" in kind for kind in getattr(text, "layer_types", None) or ()):
        masks += context * context * 16  # distances between positions, in 8 bytes, twice
    written = scores * text.num_attention_heads * (4 * itemsize + 4)
    attention = tokens * _attention_width(text) * itemsize + masks + (0 if fused else written)
    mlp = tokens * _mlp_width(text) * itemsize
    pooled = tokens * text.hidden_size * (itemsize + 3 * 4)
    return int(max(attention, mlp, pooled) + (0 if on_cuda else threads * TILES))


def logits_bytes(text: Any, sequences: int, itemsize: int, *, on_cuda: bool) -> int:
    """Most bytes of the logits of one step, and of what is done with them.

    A row per sequence is sampled from; rows of prompts whose logprobs are wanted lie beside them
    while a few at a time are looked at, in float32. Captured steps have logits of their own, and
    leave them in a place that is always there.
    """
    sampled = sequences * (itemsize * (3 if on_cuda else 1) + SAMPLING)
    scored = (sequences + SCORE_TOKENS) * itemsize + SCORE_ROWS * SCORING
    return int(text.vocab_size * max(sampled, scored))


def _whole(text: Any, context: int, sequences: int, itemsize: int, threads: int) -> int:
    """Of a prompt that goes through the model at once: an encoder-decoder's, or a hybrid's.

    Scores of all heads are written out, with a bias (T5) and in float32, and the positions that it
    is looked up by; what the encoder said is kept for every sequence, and a cache that grows is
    twice there for a moment.
    """
    if not hasattr(text, "num_attention_heads"):
        return _scan(text, context, itemsize)
    heads = max(
        getattr(text, name, None) or 0
        for name in ("num_attention_heads", "decoder_attention_heads")
    )
    scores = context * context * (heads * (4 * itemsize + 4) + 48)
    attention = context * _attention_width(text) * itemsize + scores + threads * TILES
    mlp = context * (_mlp_width(text) * itemsize + 16 * _experts(text))
    kept = sequences * context * text.hidden_size * itemsize if text.is_encoder_decoder else 0
    grown = 2 * context * numbers_per_token(text) * itemsize
    scan = 0 if text.is_encoder_decoder else _scan(text, context, itemsize)
    return int(max(attention, mlp, scan) + kept + grown)


def _scan(text: Any, context: int, itemsize: int) -> int:
    """Of a model without attention, whose prompts are not cut: a bound for a whole context.

    Where there is no kernel for it, transformers writes the discrete state out for every token in
    float32, with its two factors and what comes of them (`MambaMixer.slow_forward`).
    """
    inner = max(_inner(text), int((getattr(text, "mamba_expand", None) or 0) * text.hidden_size))
    state = getattr(text, "state_size", None) or getattr(text, "mamba_d_state", None) or 1
    token: int = inner * (4 * 4 * state + 8 * itemsize) + 4 * text.hidden_size * itemsize
    return context * token


def _attention_width(text: Any) -> int:
    """Numbers a token takes inside attention.

    The residual, its norm and the result; queries plain, split, turned, joined, contiguous and
    answered; keys and values likewise.
    """
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if latent_numbers(text):
        size = text.qk_nope_head_dim + text.qk_rope_head_dim
    width: int = 3 * text.hidden_size + 6 * text.num_attention_heads * size
    return width + 4 * numbers_per_token(text)


def _gathered(text: Any, context: int, itemsize: int) -> int:
    """Pages of one sequence laid side by side, for kernels that cannot read through a table.

    Scores are never written out on CUDA: the kernels are of the flash kind.
    """
    return context * numbers_per_token(text) * itemsize


def _masked(text: Any, tokens: int, context: int, itemsize: int) -> int:
    """What PyTorch's attention on the CPU writes out for a chunk x context.

    Its flash kernel turns a mask (1 byte) into numbers of the dtype; there is one row per query of
    a group, because groups are folded into the query axis. Keys and values of unequal size
    (latent attention) get the plain kernel: three float32 per head, query and key, and keys and
    values again in float32.
    """
    heads: int = text.num_attention_heads
    scores: int = tokens * context
    if latent_numbers(text):
        return scores * (12 * heads + 1 + itemsize) + 4 * context * numbers_per_token(text)
    groups: int = heads // (getattr(text, "num_key_value_heads", None) or heads)
    return scores * groups * (1 + itemsize)


def _mlp_width(text: Any) -> int:
    """Numbers a token takes inside the MLP, or inside the experts that are chosen for it.

    Five of the inner size: GPT-2's GELU keeps so many at once, gated ones four. An expert's share
    adds its input and output, before and after they are sorted.
    """
    hidden = text.hidden_size
    inner = _inner(text)
    width: int = 4 * hidden + 5 * inner
    if not _experts(text):
        return width
    expert = getattr(text, "moe_intermediate_size", None) or inner
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    shared = shared or (getattr(text, "n_shared_experts", None) or 0) * expert
    return max(width, int(4 * hidden + chosen * 4 * (hidden + expert) + 4 * shared))


def _inner(text: Any) -> int:
    inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None)
    if isinstance(inner, list | tuple):
        inner = max(inner)
    for name in ("d_ff", "encoder_ffn_dim", "decoder_ffn_dim"):
        inner = max(inner or 0, getattr(text, name, None) or 0)
    return int(inner or getattr(text, "n_inner", None) or 4 * text.hidden_size)


def _experts(text: Any) -> int:
    """Experts a router chooses from, 0 without."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        count: int = getattr(text, name, None) or 0
        if count:
            return count
    return 0
