"""What layers without attention keep of a sequence: states whose size no prompt changes.

Read from the cache that the model itself makes, in one forward of its skeleton on meta.
"""

from collections.abc import Iterator
from typing import Any

import torch

from service.errors import ModelUnavailable
from service.placement.tensors import nbytes

# of several tokens, because some layers take a single one as a continuation
TOKENS = 4


def bytes_per_sequence(model: Any, itemsize: int, name: str) -> list[int]:
    """Bytes of state of one sequence in each layer; 0 in a layer with attention.

    model: the skeleton in bfloat16, whose kernels all run on meta. itemsize: of the dtype that the
    model will really have; states that are kept in float32 stay so. name: the model's, for errors.
    Raises ModelUnavailable where the skeleton cannot be run, or its cache is of another kind.
    """
    ids = torch.ones(1, TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode():
            output = model(input_ids=ids, use_cache=True)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise _unknown(name, f"{type(error).__name__}: {error}") from None
    cache = getattr(output, "cache_params", None) or getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise _unknown(name, f"its cache is a {type(cache).__name__}")
    return [sum(_size(state, itemsize) for state in _states(layer)) for layer in layers]


def _states(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors of a cache's layer, but keys and values."""
    for key in ("conv_states", "recurrent_states"):
        found = getattr(layer, key, None)
        values = found.values() if isinstance(found, dict) else (found,)
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _size(state: torch.Tensor, itemsize: int) -> int:
    own = state.dtype == torch.bfloat16
    return state.numel() * itemsize if own else nbytes(state)


def _unknown(name: str, why: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{name}: the recurrent state of its layers cannot be planned ({' '.join(why.split())})",
        hint="Moorage plans recurrent models whose cache transformers keeps layer by layer",
    )
