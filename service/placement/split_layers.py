"""Layers that are cut open: what accelerate leaves out for parts on devices of their own.

accelerate moves what goes into a part to the part's device, and leaves there what comes out.
Between layers that is enough, because the next layer moves it on. Inside one it is not: the layer
adds what its parts compute to what it was given.
"""

from collections.abc import Mapping
from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.hooks import add_hook_to_module
from torch import nn

from service.placement.tensors import hooks_of


def join(model: nn.Module, device_map: object) -> None:
    """Let every part of a layer that `device_map` cuts open give back what it computes.

    The layer itself gets a hook that takes its inputs to the device of its first part that has one.
    device_map: what `from_pretrained` got. Nothing is done to layers that are placed as a whole.
    """
    if not isinstance(device_map, Mapping):
        return
    whole = set(getattr(model, "_no_split_modules", None) or ())
    skip = getattr(model, "_skip_keys_device_placement", None)
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if type(layer).__name__ not in whole:
            continue
        inside = (part for part in device_map if str(part).startswith(f"{name}."))
        hooks = [hook for part in inside if part in modules for hook in hooks_of(modules[part])]
        for hook in hooks:
            hook.io_same_device = True
        devices: list[Any] = [h.execution_device for h in hooks if h.execution_device is not None]
        if devices:
            add_hook_to_module(
                layer, AlignDevicesHook(execution_device=devices[0], skip_keys=skip), append=True
            )
