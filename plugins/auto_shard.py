"""The model spread over all GPUs, KV reserved first; offload to RAM or disk only if allowed.

The map is ours, module by module, not `device_map="auto"`: that one plans weights only, and the KV
of the busiest card overflows later. Without a GPU everything goes on the CPU.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from service.config.schema import ModelConfig
from service.placement.hardware import Hardware
from service.placement.hookspecs import hookimpl
from service.placement.plan import Placement

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@hookimpl
def plan(config: ModelConfig, hardware: Hardware) -> Placement:
    """Balanced over the devices; `on_no_fit` decides what happens to the rest."""
    from service.placement import planning

    return planning.spread(config, hardware)


@hookimpl
def load(config: ModelConfig, placement: Placement) -> "PreTrainedModel":
    """Load exactly what was planned; accelerate attaches the device hooks."""
    from service.placement.architectures import auto_class

    model: PreTrainedModel = auto_class(config).from_pretrained(
        config.folder, **placement.load_kwargs
    )
    return model


@hookimpl
def validate(model: "PreTrainedModel", placement: Placement) -> None:
    """Every module where the map put it, offloaded ones behind a hook."""
    from service.placement import checks

    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model: "PreTrainedModel", inputs: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """To the device the embedding runs on, also when its weight is offloaded."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)
