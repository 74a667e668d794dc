"""What offload hooks have in store, looked at without reading it.

accelerate's map of weights reads a whole tensor from the disk to answer whether it is there. Its
index and the header of the file say the same (accelerate/utils/offload.py,
OffloadedWeightsLoader).
"""

import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors import safe_open

from service.placement.tensors import Owner
from service.placement.tensors import resolved

# NumPy has no name for these; accelerate stores their bits under another one
STORED_BITS = {"bfloat16": "int16", "float8_e4m3fn": "int8", "float8_e5m2": "int8"}

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor that is there. `read` gets a part of it, on CPU, from RAM or from its file."""

    shape: tuple[int, ...]
    read: Callable[[Index], torch.Tensor]


def find(owner: Owner) -> Stored | None:
    """What the hook will materialise, or None if it has nothing: no entry, no file, a cut file."""
    loader, key = resolved(owner)
    state, index = getattr(loader, "state_dict", None), getattr(loader, "index", None)
    try:
        if isinstance(state, Mapping) and isinstance(index, Mapping) and key not in state:
            return _on_disk(owner, loader, key, index[key])
        tensor = loader[key]
    except (KeyError, OSError, SafetensorError):
        return None
    if tensor is None or tensor.device.type == "meta":
        return None
    return Stored(tuple(tensor.shape), lambda part: tensor[part])


def _on_disk(owner: Owner, loader: Any, key: str, entry: Mapping[str, Any]) -> Stored | None:
    file = entry.get("safetensors_file")
    if file is not None:
        part = opened(owner.opened, file).get_slice(entry.get("weight_name", key))
        dtype = getattr(torch, entry["dtype"]) if "dtype" in entry else None
        return Stored(tuple(part.get_shape()), lambda index: part[index].to(dtype=dtype))
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    path = Path(loader.save_folder) / f"{key}.dat"
    bits = numpy.dtype(STORED_BITS.get(dtype, dtype))
    if path.stat().st_size < math.prod(shape) * bits.itemsize:
        return None

    def read(index: Index) -> torch.Tensor:
        values = numpy.memmap(path, dtype=bits, shape=shape or (1,), mode="r")
        tensor = torch.tensor(values[index] if shape else values[0])
        return tensor.view(getattr(torch, dtype)) if dtype in STORED_BITS else tensor

    return Stored(shape, read)


def opened(files: dict[str, Any], path: str | Path) -> Any:
    """The safetensors file, opened once and kept in `files`: every opening parses its header."""
    name = str(path)
    if name not in files:
        files[name] = safe_open(name, framework="pt")
    return files[name]
