"""What each layer of a model keeps of one token, read from the skeleton that will be loaded.

The modules are only looked at: nothing here computes.
"""

import inspect
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerKv:
    """KV of one token in one layer: how many numbers (heads x (key size + value size)).

    numbers is 0 for a layer without attention, which may keep a state of so many bytes for every
    sequence instead, however long. window is the sliding window in tokens that the
    layer's attention is called with, None for full attention.
    """

    numbers: int
    window: int | None = None
    state: int = 0


def layers_kv(text: Any, modules: Sequence[Any]) -> tuple[LayerKv, ...]:
    """Per decoder layer what one token keeps there.

    text is transformers' text config, modules are its decoder layers in order.
    """
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(modules)
    # a model without any attention has no heads to count
    numbers = numbers_per_token(text) if any(map(_attends, kinds)) else 0
    return tuple(
        LayerKv(numbers, _window(text, module)) if _attends(kind) else LayerKv(0)
        for kind, module in zip(kinds, modules, strict=True)
    )


def numbers_per_token(text: Any) -> int:
    """Numbers that one attention layer is handed per token: heads x (key size + value size).

    Grouped heads count once. Multi-head latent attention hands over all its heads, expanded from
    the latent vector (transformers, `DeepseekV3Attention.expand_kv`); an indexer's key is one
    vector more.
    """
    if latent_numbers(text):
        key = text.qk_nope_head_dim + text.qk_rope_head_dim
        expanded: int = text.num_attention_heads * (key + text.v_head_dim)
        return expanded + (getattr(text, "index_head_dim", None) or 0)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers: int = heads * 2 * size
    return numbers


def latent_numbers(text: Any) -> int:
    """Numbers of the latent vector and rotary key of a token (DeepSeek-V2, 2.1); 0: not latent."""
    rank: int | None = getattr(text, "kv_lora_rank", None)
    return 0 if rank is None else rank + text.qk_rope_head_dim


def _attends(kind: str) -> bool:
    return "attention" in kind and "linear" not in kind


def _window(text: Any, layer: Any) -> int | None:
    """The window that a layer passes to its attention function.

    Some read it from a member set per layer (Gemma 2 and 3, Qwen 2 by `use_sliding_window`), some
    from the config, whatever `layer_types` says (Mistral, Mixtral, Phi-3). A model that sets one
    and never passes it (Qwen2-MoE) attends to everything.
    """
    for module in layer.modules():
        if "sliding_window" not in _names_passed(type(module).forward):
            continue
        if getattr(module, "is_sliding", True) is False:
            return None
        window: int | None = getattr(
            module, "sliding_window", getattr(text, "sliding_window", None)
        )
        return window or None
    return None


def _names_passed(function: Any) -> Iterator[str]:
    """Keywords that a function calls others with, and its other constant words."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    for constant in getattr(code, "co_consts", ()):
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (word for word in constant if isinstance(word, str))
