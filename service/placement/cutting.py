"""A model cut into the units that are placed as a whole, and the bytes of each."""

import math
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping

from torch import nn

from service.placement.plan import Unit
from service.placement.tensors import nbytes

# bitsandbytes: one absmax per block of 64 weights; double quantisation stores those as one byte
# each and one float32 per 256 of them, plus the two code tables (16 and 256 float32) and an offset
# per tensor
BLOCK = 64
NESTED_BLOCK = 256
TABLES = 16 * 4 + 256 * 4 + 4


def quantized_bytes(elements: int, rows: int, quantize: str) -> int:
    """Bytes of one quantised weight with its scales.

    nf4 and fp4: two weights a byte, absmax per block of 64 quantised again (bitsandbytes,
    `functional.quantize_4bit`, compress_statistics). int8: one byte a weight, a float32 per row
    (`Int8Params.SCB`).
    """
    if quantize == "int8":
        return elements + 4 * rows
    blocks = math.ceil(elements / BLOCK)
    return math.ceil(elements / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + TABLES


def opened(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """What must be cut open so that each of these modules is a unit: all that they are inside of.

    Names that the model does not have are passed over.
    """
    known = {name for name, _ in model.named_modules()}
    found = set()
    for name in known.intersection(names):
        while name := name.rpartition(".")[0]:
            found.add(name)
    return frozenset(found)


def units(
    model: nn.Module,
    quantize: str,
    converted: Mapping[str, nn.Module],
    layers: Mapping[str, int],
    apart: Collection[str] = (),
) -> Iterator[Unit]:
    """Cut the model at its no-split modules, in order, loose tensors included.

    converted: the linears that will be quantised. layers: decoder layer's name -> bytes of KV.
    apart: modules that are to be units of their own. A layer that has one inside is cut into its
    children, and its KV goes with the one that knows its number among the layers: the attention.
    """
    whole = set(getattr(model, "_no_split_modules", None) or ())
    open_ = opened(model, apart)
    seen: set[int] = set()

    def size(name: str, module: nn.Module) -> int:
        total = 0
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            path = f"{name}.{key}" if name else key
            owner, _, leaf = path.rpartition(".")
            linear = converted.get(owner) if leaf == "weight" else None
            if linear is None:
                total += nbytes(tensor)
            else:
                rows = getattr(linear, "out_features", tensor.shape[-1])
                total += quantized_bytes(tensor.numel(), rows, quantize)
        return total

    def cut(name: str, module: nn.Module, kv: int, *, inside: bool) -> Iterator[Unit]:
        """inside: in a layer that is cut open, where what is not open itself is a unit."""
        children = list(module.named_children())
        kv += layers.get(name, 0)
        one = inside or name in layers or type(module).__name__ in whole or not children
        if name and one and name not in open_:
            if any(True for _ in (*module.parameters(), *module.buffers())):
                yield Unit(name, size(name, module), kv)
            return
        for key, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield Unit(f"{name}.{key}" if name else key, nbytes(tensor))
        numbered = [key for key, child in children if hasattr(child, "layer_idx")]
        heir = next(iter([*numbered, *(key for key, _ in children)]), None)
        for key, child in children:
            path = f"{name}.{key}" if name else key
            yield from cut(path, child, kv if key == heir else 0, inside=bool(name) and one)

    return cut("", model, 0, inside=False)
