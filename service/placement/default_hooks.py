"""What a strategy does that leaves `plan` or `release` out. Registered below every strategy."""

from typing import TYPE_CHECKING

from service.config.schema import ModelConfig
from service.placement.hardware import Hardware
from service.placement.hookspecs import hookimpl
from service.placement.plan import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@hookimpl(trylast=True)
def plan(config: ModelConfig, hardware: Hardware) -> Placement:
    """The whole model on the first GPU if there is one, else on the CPU."""
    from service.placement import planning

    device = hardware.gpus[0].id if hardware.gpus else "cpu"
    return planning.on_one_device(config, hardware, device)


@hookimpl(trylast=True)
def release(model: "PreTrainedModel") -> None:
    """Nothing beyond memory."""
