"""Weights in 4 bits (bitsandbytes nf4), on the GPUs if there are any, else on the CPU."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from service.config.schema import ModelConfig
from service.errors import PlacementMismatch
from service.errors import PlacementUnavailable
from service.placement.hardware import Hardware
from service.placement.hookspecs import hookimpl
from service.placement.plan import Placement

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DEFAULTS = {"quantize": "nf4"}


@hookimpl
def plan(config: ModelConfig, hardware: Hardware) -> Placement:
    """Spread like auto-shard; refuses a format that is not 4-bit."""
    from service.placement import planning

    if config.quantize not in ("nf4", "fp4"):
        raise PlacementUnavailable(
            f"strategy four-bit cannot do quantize: {config.quantize}",
            hint="use quantize: nf4 or fp4, or another strategy",
        )
    return planning.spread(config, hardware)


@hookimpl
def load(config: ModelConfig, placement: Placement) -> "PreTrainedModel":
    """Load and quantise exactly what was planned."""
    from service.placement.architectures import auto_class

    model: PreTrainedModel = auto_class(config).from_pretrained(
        config.folder, **placement.load_kwargs
    )
    return model


@hookimpl
def validate(model: "PreTrainedModel", placement: Placement) -> None:
    """Where it was planned, and really in 4 bits: the flag on the model proves nothing."""
    from service.placement import checks

    checks.placed_as_planned(model, placement)
    if not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise PlacementMismatch("no linear layer is 4-bit (F13)", failure_class="F13")


@hookimpl
def place_inputs(model: "PreTrainedModel", inputs: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """To the device the embedding is on."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)
