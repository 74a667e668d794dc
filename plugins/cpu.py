"""The whole model in RAM, computed by the CPU."""

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
    """Everything on "cpu", whatever accelerators there are."""
    from service.placement import planning

    return planning.on_one_device(config, hardware, "cpu")


@hookimpl
def load(config: ModelConfig, placement: Placement) -> "PreTrainedModel":
    """Load exactly what was planned."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)


@hookimpl
def validate(model: "PreTrainedModel", placement: Placement) -> None:
    """Every tensor on the CPU."""
    from service.placement import checks

    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model: "PreTrainedModel", inputs: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Inputs are made on the CPU and stay there."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)
