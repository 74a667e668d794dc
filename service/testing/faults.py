"""Faults planted in a sound model: what `validate` must refuse, each undone afterwards."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from service.placement.tensors import offload_owners

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fault:
    """What is wrong ("lm_head.weight is on meta"), and the tensor that must be named, if one."""

    what: str
    tensor: str | None
    planted: Callable[[], AbstractContextManager[None]]


def faults(model: "PreTrainedModel") -> Iterator[Fault]:
    """The faults that this model can have. The last one, where it is offloaded, is not undone."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if module is head and weight is not None and weight.device.type != "meta":
            yield _moved(model, f"{name}.weight", "meta")
    buffers = [name for name, buffer in model.named_buffers() if buffer.device.type != "meta"]
    if buffers:
        yield _moved(model, buffers[0], "meta")
    matrices = [
        (name, weight)
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and weight.device.type != "meta"
    ]
    if matrices:
        name, weight = matrices[len(matrices) // 2]
        # beside RAM a machine without a GPU has no device but meta
        yield _moved(model, name, "meta" if weight.device.type == "cpu" else "cpu")
    if offload_owners(model):
        yield Fault("the offload hooks are gone", None, partial(_unhooked, model))


def _moved(model: "PreTrainedModel", name: str, device: str) -> Fault:
    return Fault(f"{name} is on {device}", name, partial(_replaced, model, name, device))


@contextmanager
def _replaced(model: "PreTrainedModel", name: str, device: str) -> Iterator[None]:
    """An uninitialised tensor of the same shape and dtype in place of one of the model's."""
    module = model.get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    parameter, buffer = module._parameters.get(key), module._buffers.get(key)
    if parameter is not None:
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        module._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)
    elif buffer is not None:
        module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    try:
        yield
    finally:
        if parameter is not None:
            module._parameters[key] = parameter
        elif buffer is not None:
            module._buffers[key] = buffer


@contextmanager
def _unhooked(model: "PreTrainedModel") -> Iterator[None]:
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    yield
