"""The whole model in RAM, computed by the CPU."""

from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Literal

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field

from service.config.schema import ModelConfig
from service.placement.hardware import Hardware
from service.placement.hookspecs import hookimpl
from service.placement.plan import Placement

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Options(BaseModel):
    """`options:` of a deployment with this strategy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack: Literal["auto", "off"] = Field(
        "auto",
        description="A second copy of unquantised linear weights, in the layout the CPU multiplies "
        "fastest, if it fits.",
    )


@hookimpl
def plan(config: ModelConfig, hardware: Hardware) -> Placement:
    """Everything on "cpu", whatever accelerators there are."""
    from service.placement import cpu_planning

    options = config.options or Options()
    return cpu_planning.plan(config, hardware, pack=options.pack == "auto")


@hookimpl
def load(config: ModelConfig, placement: Placement) -> "PreTrainedModel":
    """Load exactly what was planned; then pack or quantise its linear layers as planned."""
    from service.placement import cpu_planning
    from service.placement.architectures import auto_class

    model: PreTrainedModel = auto_class(config).from_pretrained(
        config.folder, **placement.load_kwargs
    )
    cpu_planning.carry_out(model, config, placement)
    return model


@hookimpl
def validate(model: "PreTrainedModel", placement: Placement) -> None:
    """Every tensor on the CPU, and the planned layers packed."""
    from service.placement import checks
    from service.placement import cpu_planning

    checks.placed_as_planned(model, placement)
    cpu_planning.packed_as_planned(model, placement)


@hookimpl
def place_inputs(model: "PreTrainedModel", inputs: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Inputs are made on the CPU and stay there."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)


@hookimpl
def release(model: "PreTrainedModel") -> None:
    """Take the packed copies away."""
    from service.placement import cpu_linears

    cpu_linears.unpack(model)
