"""Wrong: reads the weights, where there are any, to know their size."""

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def plan(config, hardware):
    from safetensors.torch import load_file

    from service.placement import planning

    for path in config.folder.glob("*.safetensors"):
        load_file(path)  # wrong
    return planning.on_one_device(config, hardware, "cpu")
