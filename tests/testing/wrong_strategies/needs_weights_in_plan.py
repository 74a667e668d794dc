"""Wrong: plans only where the weights are."""

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def plan(config, hardware):
    from service.placement import planning

    (config.folder / "model.safetensors").stat()  # wrong
    return planning.on_one_device(config, hardware, "cpu")
