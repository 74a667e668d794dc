"""The attention function that transformers calls, and what it finds there.

Models are unmodified: `transformers.AttentionInterface` gives every attention layer this function,
`AttentionMaskInterface` gives it no mask. A step flattens all its sequences into one row of tokens;
which token belongs to whom is known to the step alone, which is bound to the thread while the model
runs.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers import AttentionMaskInterface

NAME = "moorage"
# what some models pass beside queries, keys and values, and this engine does not compute
NOT_COMPUTED = ("s_aux", "position_bias", "head_mask", "alibi")

_thread = threading.local()


class NotCarried(Exception):
    """The engine's fast path does not carry this model; the message says why."""


@dataclass(frozen=True)
class Layer:
    """What one attention layer hands over, seen in a trial forward.

    heads: of keys and values. key_size, value_size: of one head. window: most keys a query sees,
    itself included, or None. softcap: scores x become softcap * tanh(x / softcap), or None.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_size: int
    value_size: int
    window: int | None
    softcap: float | None


class Step(Protocol):
    """One forward of the model, as its attention layers see it."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """query [T, heads, key size], key and value [T, KV heads, size], any strides.

        Returns [T, heads, value size].
        """


@contextmanager
def bound(step: Step) -> Iterator[None]:
    """Have the attention layers that run on this thread call `step`."""
    _thread.step = step
    try:
        yield
    finally:
        del _thread.step


def current() -> Step:
    """The step that is bound to this thread."""
    found: Step = _thread.step
    return found


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls, once a layer. query [1, heads, T, size], key and value alike.

    Returns [1, T, heads, value size]. Raises NotCarried for what this engine does not compute.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rows = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    index: Any = module.layer_idx
    if torch.compiler.is_compiling():
        return _opaque(*rows, index, scale).unsqueeze(0), None
    step = current()
    if isinstance(step, Trial):
        step.see(module, query, key, value, attention_mask, others)
    return step.attend(index, *rows, scale).unsqueeze(0), None


@torch.library.custom_op("moorage::attend", mutates_args=())
def _opaque(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float
) -> torch.Tensor:
    """What a compiled model calls: `attend` of the step that is bound when it runs."""
    return current().attend(layer, query, key, value, scale).contiguous()


@_opaque.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    """No mask. local_size: the window or chunk that the model would have put into it."""
    if torch.compiler.is_compiling():
        return
    step = getattr(_thread, "step", None)
    if isinstance(step, Trial) and local_size is not None:
        step.masked.add(local_size)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)


class Trial:
    """A step of one sequence from its start that notes what every layer hands over."""

    def __init__(self) -> None:
        self.layers: dict[int, Layer] = {}
        self.masked: set[int] = set()  # windows of the masks that the model asked for

    def see(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        others: dict[str, Any],
    ) -> None:
        """Note one layer. Raises NotCarried."""
        name = type(module).__name__
        for argument in NOT_COMPUTED:
            if others.get(argument) is not None:
                raise NotCarried(f"{name} passes {argument}")
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index in self.layers:
            raise NotCarried(f"{name} has no layer_idx of its own")
        if attention_mask is not None:
            raise NotCarried(f"{name} makes a mask of its own")
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise NotCarried(f"{name} attends to something else than its own tokens")
        window, softcap = others.get("sliding_window"), others.get("softcap")
        self.layers[index] = Layer(
            key.device,
            key.dtype,
            key.shape[1],
            key.shape[3],
            value.shape[3],
            int(window) if window else None,
            float(softcap) if softcap else None,
        )

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        shape = self.layers[layer]
        return attend_dense(query, key, value, scale, None, shape.softcap, causal=True)


def attend_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of one sequence. query [m, heads, size], key and value [n, KV heads, size].

    mask: bool [m, n], True where a query sees a key. causal: m == n, each sees itself and those
    before. Returns [m, heads, value size]. Softcap: scores are softcap * tanh(scores / softcap)
    (Gemma 2, arXiv:2408.00118, section 2).
    """
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
        return out[0].transpose(0, 1)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v)[0].transpose(0, 1)
