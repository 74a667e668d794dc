"""Which device inputs belong on (F7). The only place that moves inputs, and that calls the hook.

`model.device` is the first parameter's device: meta when the embedding is offloaded, and some other
card's when layers are spread. So it is never asked.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Protocol

import torch

from service.errors import PlacementMismatch
from service.errors import PluginError
from service.errors import ServiceError
from service.placement.tensors import hooks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PlaceInputs(Protocol):
    """The bound hook of the strategy: CPU tensors in, the same where the model expects them."""

    def __call__(
        self, *, model: "PreTrainedModel", inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]: ...


def place(
    place_inputs: PlaceInputs,
    model: "PreTrainedModel",
    inputs: Mapping[str, torch.Tensor],
    who: str = "The strategy's place_inputs",
) -> dict[str, torch.Tensor]:
    """`inputs` where the strategy puts them: the only call of `place_inputs`, once a forward.

    inputs: CPU tensors by name. Returns what the hook returned: a dict with the same keys, shapes
    and dtypes; values and devices are not looked at, which would make an accelerator wait. Raises
    PluginError, whose message starts with `who`, if the hook raises or breaks that contract; a
    ServiceError of the hook keeps its kind.
    """
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}
    try:
        placed = place_inputs(model=model, inputs=inputs)
    except ServiceError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may raise anything; say that it was it
        raise PluginError(f"{who} raised {type(error).__name__}: {error}") from error
    if not isinstance(placed, dict) or placed.keys() != expected.keys():
        found = sorted(map(str, placed)) if isinstance(placed, dict) else type(placed).__name__
        raise PluginError(
            f"{who} returned {found} for inputs {sorted(expected)}.",
            hint="Return a dict with the same keys, shapes, dtypes and values.",
        )
    for name, (shape, dtype) in expected.items():
        tensor = placed[name]
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
            shown = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor)
            raise PluginError(
                f"{who} returned {shown} for {name} of {tuple(shape)}.",
                hint="Return every tensor with the shape it came with.",
            )
        if tensor.dtype != dtype:
            raise PluginError(
                f"{who} returned {tensor.dtype} for {name} of {dtype}.",
                hint="Return every tensor with the dtype it came with.",
            )
    return placed


def input_device(model: "PreTrainedModel", planned: str | None = None) -> torch.device:
    """Where token ids must be.

    Asked in this order: the device hook of the input embedding, the embedding's weight unless it
    is on meta, the hook of the whole model, the plan. Raises PlacementMismatch (F7) when none of
    them knows.
    """
    embedding = model.get_input_embeddings()
    for hook in hooks_of(embedding):
        if hook.execution_device is not None:
            return _device(hook.execution_device)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
        return weight.device
    for hook in hooks_of(model):
        if hook.execution_device is not None:
            return _device(hook.execution_device)
    if planned is not None:
        return torch.device(planned)
    raise PlacementMismatch(
        "nothing says where inputs belong: the input embedding is on meta and has no device hook "
        f"(F7); model.device says {model.device}",
        hint="load with a device_map, or let the strategy's plan name main_device",
        failure_class="F7",
    )


def to_input_device(
    model: "PreTrainedModel", inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The inputs of one step on `input_device(model)`: what a strategy's `place_inputs` returns."""
    device = input_device(model)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What a step needs beside its inputs, such as page tables: a CPU tensor to `device`, without
    waiting for it. One that is there already stays.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _device(device: "torch.device | str | int") -> torch.device:
    """accelerate writes an accelerator as its number."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
