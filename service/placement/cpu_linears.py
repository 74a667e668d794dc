"""Linear layers as the CPU computes them fastest: packed copies, int8 and int4 weights.

torch has the kernels and not the modules. A packed layer is the model's own `nn.Linear` with a
second copy of its weight beside it, in oneDNN's blocked layout, which its forward uses; nothing
else changes. A quantised layer takes the place of the original one.

    int8  a byte a weight, one float32 scale per row (symmetric). Inputs are rounded to 16 bits,
          per token, so that what one sequence gets does not depend on its neighbours.
    int4  half a byte a weight, a scale and a middle per group of 32, in the model's dtype. Inputs
          stay as they are.

Layers that read the same tensor are computed in one call, see cpu_groups. Everything here is for
layers on the CPU that no hook owns.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import Self

import torch
from torch import nn

from service.placement import cpu_groups
from service.placement import raw_weights
from service.placement.cpu_groups import Shared

# smaller layers gain less from packing than the call costs
LEAST_TO_PACK = 2**16
# oneDNN's blocks: packed layers fill them, so that a copy is as large as its weight
BLOCK = 64
# what the int4 kernel takes: rows a multiple of the first, columns of the second
ROWS, GROUP = 16, 32
FORMATS = ("int8", "int4")
# what the largest number of a token becomes: in digits of base 256 from -128 to 127, 127 and 0
LARGEST = 127 * 256
# packed layers that `differing` looks at, and how far two orders of the same sum are apart at most
COMPARED, CLOSE = 16, 0.02


class PackedLinear(nn.Linear):
    """An `nn.Linear` whose forward reads `packed`, an opaque copy of its weight, or of the weights
    of its whole group.
    """

    packed: torch.Tensor
    shared: Shared | None = None
    place = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the same dtype."""
        if self.shared is None:
            return self._product(input, self.bias)
        result = self.shared.part(self.place, input, self._product)
        return result if self.bias is None else result + self.bias

    def _product(self, input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.packed, bias, "none", [], ""
        )
        return result


class QuantisedLinear(nn.Module):
    """weight, scale: of this layer, or the very tensors of its whole group. bias: as it was."""

    weight: nn.Parameter
    scale: nn.Parameter

    def __init__(self, linear: nn.Linear, group: Sequence[nn.Linear] = ()) -> None:
        """group: layers that are computed together with this one, itself among them."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shared: Shared | None = None
        self.place = 0
        self._quantise([layer.weight.detach() for layer in group or (linear,)])
        self.bias = linear.bias

    def beside(self, linear: nn.Linear, place: int, shared: Shared) -> Self:
        """The layer of the group at this place, with the tensors of this one."""
        made = type(self).__new__(type(self))
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.shared, made.place = shared, place
        for name, parameter in self._parameters.items():
            if name != "bias":
                made.register_parameter(name, parameter)
        for name, buffer in self._buffers.items():
            made.register_buffer(name, buffer, persistent=False)
        made.bias = linear.bias
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the same dtype; int4: the scale's."""
        if self.shared is None:
            result = self._product(input)
        else:
            result = self.shared.part(self.place, input, self._product)
        return result if self.bias is None else result + self.bias

    def _quantise(self, weights: Sequence[torch.Tensor]) -> None:
        raise NotImplementedError

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Int8Linear(QuantisedLinear):
    """weight: int8 in oneDNN's layout. scale: float32 [rows]."""

    def _quantise(self, weights: Sequence[torch.Tensor]) -> None:
        tiny = torch.finfo(torch.float32).tiny
        scales = [w.float().abs().amax(1).clamp_(min=tiny) / 127 for w in weights]
        whole = torch.cat(
            [
                (w.float() / scale[:, None]).round_().to(torch.int8)
                for w, scale in zip(weights, scales, strict=True)
            ]
        )
        packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(torch.cat(scales), requires_grad=False)
        self.register_buffer("zero", torch.zeros(len(whole), dtype=torch.int32), False)

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        """A token is written in two digits of base 256, which are two rows of one product: with
        one digit, 0.4 % of its largest number is lost to rounding, with two, nothing that counts.

        A token's largest number becomes 32,512. Digits are unsigned, 128 too large, because the
        instruction multiplies unsigned by signed. NaN and infinity stay: the scale carries them.
        """
        x = input.reshape(-1, self.in_features).float()
        count = len(x)
        # abs and amax are vectorised; a norm, or either on bfloat16, takes up to ten times as long
        step = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30).mul_(1 / LARGEST)
        # rounds: the sum is positive, and its end is cut
        whole = (x / step).add_(128 * 256 + 128 + 0.5).to(torch.int32)
        digits = torch.empty(2 * count, self.in_features, dtype=torch.uint8)
        digits[:count].copy_(whole)  # the low byte
        digits[count:].copy_(whole.bitwise_right_shift_(8))
        out = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        result = torch.add(out[:count], out[count:], alpha=256).mul_(step)
        return result.to(input.dtype).reshape(*input.shape[:-1], -1)


class Int4Linear(QuantisedLinear):
    """weight: uint8, two weights each. scale: [in_features / 32, rows, 2], the step and the value
    of a stored 8, in the dtype of what it computes with.
    """

    def _quantise(self, weights: Sequence[torch.Tensor]) -> None:
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        dtype = weight.dtype
        groups = weight.float().reshape(len(weight), -1, GROUP)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = ((high - low) / 15).clamp_(min=1e-8).to(dtype).float()
        middle = (low + 8 * step).to(dtype).float()
        whole = (groups - middle).div_(step).round_().add_(8).clamp_(0, 15)
        rows = whole.reshape(len(weight), -1).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows, 1)
        scale = torch.cat((step, middle), 2).transpose(0, 1).contiguous().to(dtype)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        x = input.reshape(-1, self.in_features).contiguous()  # it takes nothing else
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.weight, GROUP, self.scale
        )
        return result.reshape(*input.shape[:-1], -1)


# --- which layers, and their bytes: of a model with weights, or of its skeleton on meta


def packable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that get a packed copy, tied ones too."""
    for name, module in _linears(model):
        fills = module.out_features % BLOCK == 0 and module.in_features % BLOCK == 0
        known = module.weight.dtype in (torch.bfloat16, torch.float32)
        if fills and known and module.weight.numel() >= LEAST_TO_PACK:
            yield name, module


def quantisable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that become int8 or int4. The others, such as an odd-sized head, stay."""
    found = {
        name: module
        for name, module in _linears(model)
        if module.out_features % ROWS == 0 and module.in_features % GROUP == 0
    }
    raw = raw_weights.read_past(model, found)
    yield from ((name, module) for name, module in found.items() if name not in raw)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):
            yield name, module


def format_of(name: str, model: Any, quantize: str) -> str:
    """The format of one layer. The head is int8 under int4 too: what it rounds nothing corrects."""
    head = model.get_output_embeddings()
    return "int8" if model.get_submodule(name) is head else quantize


def quantised_bytes(linear: nn.Linear, quantize: str) -> int:
    """Bytes of the weight, scales and zeros that replace this layer's weight.

    int8: oneDNN pads both sides to 64 and keeps a sum per row; a scale and a zero per row, 4 bytes
    each. int4: half a byte, and two numbers of the layer's dtype per group.
    """
    rows, columns = linear.out_features, linear.in_features
    if quantize == "int8":
        padded = -(-rows // BLOCK) * BLOCK
        return padded * (-(-columns // BLOCK) * BLOCK + 4) + 8 * rows
    return rows * columns // 2 + 2 * rows * (columns // GROUP) * linear.weight.element_size()


# --- doing and undoing


@torch.no_grad()
def pack(model: Any) -> int:
    """Give every `packable` layer its packed copy; return how many. The weights stay in place.

    Layers that read the same tensor get one copy, which each of them holds.
    """
    found = dict(packable(model))
    for names in cpu_groups.with_alone(found, cpu_groups.find(model, found)):
        layers = [found[name] for name in names]
        weights = [layer.weight.detach() for layer in layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        shared = Shared(layer.out_features for layer in layers) if layers[1:] else None
        for place, layer in enumerate(layers):
            layer.register_buffer("packed", packed, persistent=False)
            layer.__class__ = PackedLinear
            layer.__dict__.update(shared=shared, place=place)
    return len(found)


def unpack(model: nn.Module) -> None:
    """Take all packed copies away: the layers are what they were."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            del module.packed, module.shared, module.place
            module.__class__ = nn.Linear  # type: ignore[assignment]


@torch.inference_mode()
def differing(model: nn.Module) -> list[str]:
    """Names of packed layers whose copy does not compute what their weight does, among a sample
    that has the last. Weights that are not finite say nothing, and are for others to find.
    """
    packed = [(name, its) for name, its in model.named_modules() if isinstance(its, PackedLinear)]
    found = []
    for name, layer in packed[:: -(-len(packed) // COMPARED) or 1] + packed[-1:]:
        weight = layer.weight
        x = torch.linspace(-1, 1, layer.in_features).to(weight.dtype)[None]
        exact, near = nn.functional.linear(x, weight).float(), layer._product(x).float()
        if layer.shared is not None:
            near = near.split(layer.shared.sizes, -1)[layer.place]  # type: ignore[no-untyped-call]
        if exact.isfinite().all() and not (near - exact).norm() <= CLOSE * exact.norm():
            found.append(name)
    return list(dict.fromkeys(found))


@torch.no_grad()
def quantise(model: Any, quantize: str) -> int:
    """Replace every `quantisable` layer, dropping its weight as it goes; return how many.

    quantize: "int8" or "int4". A tied head gets a copy of its own, the embedding keeps its values.
    Layers that read the same tensor hold one weight in common.
    """
    found = dict(quantisable(model))
    # of others, one weight would be smaller than the planned ones together
    whole = {name: layer for name, layer in found.items() if layer.out_features % BLOCK == 0}
    names = cpu_groups.with_alone(list(found), cpu_groups.find(model, whole))
    del found, whole
    for group in names:
        kind = Int8Linear if format_of(group[0], model, quantize) == "int8" else Int4Linear
        layers = [model.get_submodule(name) for name in group]
        made = [kind(layers[0], layers)]
        if layers[1:]:
            shared = Shared(layer.out_features for layer in layers)
            made = [made[0].beside(layer, place, shared) for place, layer in enumerate(layers)]
        for name, layer in zip(group, made, strict=True):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, layer)
    return sum(map(len, names))
