"""The whole model on one GPU."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

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

    device: int = Field(0, ge=0, description="Number of the GPU, as in cuda:N.")


@hookimpl
def plan(config: ModelConfig, hardware: Hardware) -> Placement:
    """Everything on the chosen GPU, weights and KV; refused if that is too small."""
    from service.placement import planning

    options = config.options or Options()
    return planning.on_one_device(config, hardware, f"cuda:{options.device}")


@hookimpl
def load(config: ModelConfig, placement: Placement) -> "PreTrainedModel":
    """Load exactly what was planned."""
    from service.placement.architectures import auto_class

    model: PreTrainedModel = auto_class(config).from_pretrained(
        config.folder, **placement.load_kwargs
    )
    return model


@hookimpl
def validate(model: "PreTrainedModel", placement: Placement) -> None:
    """Every tensor on the planned GPU."""
    from service.placement import checks

    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model: "PreTrainedModel", inputs: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """To the GPU that holds the embedding."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)
