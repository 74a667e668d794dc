"""The last layers rest on disk and are read at every step; all else is in memory.

For a model a little larger than the memory there is. Try it: it is the strategy of
`examples/moorage.yaml`, and it needs no GPU. Start with `plan`; the other three are what most
strategies look like.
"""

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field

from service.placement.hookspecs import hookimpl


class Options(BaseModel):
    """What `options:` of a deployment may say. A misspelt one is refused with its line."""

    model_config = ConfigDict(extra="forbid")

    layers: int = Field(1, ge=0, description="How many layers rest on disk, counted from the end.")


@hookimpl
def plan(config, hardware):
    """Everything on the first GPU, or in RAM without one, but the last layers on disk."""
    from service.placement import planning

    memory = hardware.gpus[0].id if hardware.gpus else "cpu"
    # layers are what has a KV cache; on disk there are at most as many as the model has
    layers = [unit.name for unit in planning.units(config, hardware) if unit.kv]
    on_disk = layers[max(0, len(layers) - config.options.layers) :]
    # weights, KV and overhead are added up per device, and refused where they do not fit;
    # the placement says itself that offload is meant
    return planning.mapped(config, hardware, {"": memory, **dict.fromkeys(on_disk, "disk")})


@hookimpl
def load(config, placement):
    """Exactly what was planned."""
    from service.placement.architectures import auto_class

    return auto_class(config).from_pretrained(config.folder, **placement.load_kwargs)


@hookimpl
def validate(model, placement):
    """Every tensor where the plan says, those on disk behind a hook that reads them."""
    from service.placement import checks

    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    """To the device the embedding runs on."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)
