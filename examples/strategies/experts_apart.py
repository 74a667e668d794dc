"""The experts of a mixture of experts on a device of their own; attention and routers on the GPU.

Experts are most of such a model's weights and compute little for each token. They go on the second
GPU; without one they rest in RAM, or on disk, and are copied to the first at every step.
"""

import dataclasses
from typing import Literal

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field

from service.placement.hookspecs import hookimpl


class Options(BaseModel):
    """What `options:` of a deployment may say."""

    model_config = ConfigDict(extra="forbid")

    experts: Literal["auto", "cpu", "disk"] = Field(
        "auto", description="Where the experts are; auto: the second GPU, or RAM without one."
    )


@hookimpl
def plan(config, hardware):
    """A map that names modules inside the layers: every `experts` here, all else there."""
    from service.placement import planning

    cards = [gpu.id for gpu in hardware.gpus]
    main = cards[0] if cards else "cpu"
    apart = config.options.experts
    if apart == "auto":
        apart = cards[1] if len(cards) > 1 else "cpu"
    experts = [name for name in planning.modules(config) if name.endswith(".experts")]
    made = planning.mapped(config, hardware, {"": main, **dict.fromkeys(experts, apart)})
    if experts:
        return made
    note = f"{config.model_id} has no experts: all of it is on {main}."
    return dataclasses.replace(made, notes=(*made.notes, note))


@hookimpl
def load(config, placement):
    """Exactly what was planned."""
    from service.placement.architectures import auto_class

    return auto_class(config).from_pretrained(config.folder, **placement.load_kwargs)


@hookimpl
def validate(model, placement):
    """Every tensor where the plan says."""
    from service.placement import checks

    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    """To the device of the embedding."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)
