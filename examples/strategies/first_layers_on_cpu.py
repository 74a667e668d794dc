"""The first layers rest in RAM and are copied to the GPU at every step; all else is on the GPU.

For a model a little larger than the card. It needs a GPU and refuses a machine without one: where
one config serves both, give it a `fallback: [cpu]`. Only `plan` differs from the twenty lines of
docs/plugin-guide.md: a map, handed to `planning.mapped`.
"""

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field

from service.errors import PlacementUnavailable
from service.placement.hookspecs import hookimpl


class Options(BaseModel):
    """What `options:` of a deployment may say."""

    model_config = ConfigDict(extra="forbid")

    layers: int = Field(4, ge=1, description="How many layers rest in RAM, counted from the first.")


@hookimpl
def plan(config, hardware):
    """The first layers in RAM, which the placement declares as offload; the rest on the GPU."""
    from service.placement import planning

    if not hardware.gpus:
        raise PlacementUnavailable(
            f"strategy {config.strategy} needs a GPU, and there is none (F19)",
            hint="use strategy: cpu, or add fallback: [cpu]",
            failure_class="F19",
        )
    layers = [unit.name for unit in planning.units(config, hardware) if unit.kv]
    in_ram = dict.fromkeys(layers[: config.options.layers], "cpu")
    return planning.mapped(config, hardware, {"": hardware.gpus[0].id, **in_ram})


@hookimpl
def load(config, placement):
    """Exactly what was planned; accelerate attaches the hooks that copy."""
    from service.placement.architectures import auto_class

    return auto_class(config).from_pretrained(config.folder, **placement.load_kwargs)


@hookimpl
def validate(model, placement):
    """Every tensor where the plan says, those in RAM behind a hook."""
    from service.placement import checks

    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    """To the GPU."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)
