"""Walk a model's tensors: where each one is, and which offload hook owns it."""

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.hooks import SequentialHook
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Owner:
    """The offload hook that materialises a tensor before its module runs.

    opened: safetensors files that were opened to look into them, shared by the owners of a model.
    """

    hook: AlignDevicesHook
    key: str
    opened: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def fetch(self) -> torch.Tensor:
        """The stored tensor, on CPU. Raises KeyError if the hook's map does not have it."""
        value: torch.Tensor = self.hook.weights_map[self.key]
        return value


def hooks_of(module: nn.Module) -> Iterator[AlignDevicesHook]:
    """The device hooks accelerate put on this very module."""
    hook = getattr(module, "_hf_hook", None)
    inner = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return (h for h in inner if isinstance(h, AlignDevicesHook))


def offload_owners(model: nn.Module) -> Mapping[str, Owner]:
    """Tensor name -> the hook that owns it, for every tensor that an offload hook covers."""
    owners: dict[str, Owner] = {}
    opened: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        for hook in hooks_of(module):
            if not hook.offload or hook.weights_map is None:
                continue
            for key, _ in _tensors(module, hook):
                owners[f"{prefix}.{key}" if prefix else key] = Owner(hook, key, opened)
    return owners


def _tensors(module: nn.Module, hook: AlignDevicesHook) -> Iterator[tuple[str, torch.Tensor]]:
    deep = bool(hook.place_submodules)
    yield from module.named_parameters(recurse=deep)
    if hook.offload_buffers:
        yield from module.named_buffers(recurse=deep)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def only_device(model: nn.Module) -> torch.device | None:
    """The device that all parameters and buffers are on, or None if there are several."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def stored_on(owner: Owner) -> str:
    """Where an offloaded tensor rests: "cpu" (a state dict in RAM) or "disk" (a file)."""
    loader, key = resolved(owner)
    state: Any = getattr(loader, "state_dict", loader)
    return "cpu" if state is not None and key in state else "disk"


def resolved(owner: Owner) -> tuple[Any, str]:
    """The map in which a hook really looks, and the name it looks for there."""
    loader, key = owner.hook.weights_map, owner.key
    while hasattr(loader, "prefix"):  # accelerate's PrefixedDataset, possibly nested
        key, loader = f"{loader.prefix}{key}", loader.dataset
    return loader, key


def scales_of(module: Any) -> list[torch.Tensor]:
    """The tensors beside the weight of a bitsandbytes linear that are needed to read it.

    4-bit: absmax and code tables of its quant_state, and of the nested one. int8: the row scales,
    on the weight until the first forward and in the module's state after it. Empty: it cannot be
    read.
    """
    if type(module).__name__ == "Linear8bitLt":
        rows = getattr(module.weight, "SCB", None)
        rows = rows if rows is not None else module.state.SCB
        return [] if rows is None else [rows]
    state = getattr(module.weight, "quant_state", None)
    found: list[torch.Tensor] = []
    while state is not None:
        # bitsandbytes drops parts of the state once a layer is packed for the CPU
        parts = (getattr(state, part, None) for part in ("absmax", "code", "offset"))
        found += [part for part in parts if isinstance(part, torch.Tensor)]
        state = getattr(state, "state2", None)
    return found


def own_scales(module: Any) -> list[torch.Tensor]:
    """The scales of an int8 or int4 linear of our own, which are among its parameters, or of a
    torchao weight, which are a part of it.
    """
    scale = getattr(module, "scale", None)
    if scale is None:
        scale = getattr(module.weight, "scale", None)
    return [scale] if isinstance(scale, torch.Tensor) else []


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that one is made of: torchao's weights have numbers and their scales. Else [it].

    https://docs.pytorch.org/docs/stable/notes/extending.html, wrapper subclasses.
    """
    whole: Any = tensor
    if not is_traceable_wrapper_subclass(whole):
        return [tensor]
    names, _ = whole.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(whole, name))]


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, also on meta; of an opaque or composed one, all it takes."""
    parts = parts_of(tensor)
    if parts[0] is not tensor:
        return sum(nbytes(part) for part in parts)
    if tensor.is_mkldnn:
        size: int = torch.ops.mkldnn._nbytes(tensor)
        return size
    return tensor.numel() * tensor.element_size()


def listed(names: list[str], most: int = 3) -> str:
    """The first names of a list and how many more there are, for messages."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
