"""Wrong: divides by what there may be none of."""

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def plan(config, hardware):
    from service.placement import planning

    1 / (hardware.cpu.free_bytes // 2**20)  # wrong
    return planning.on_one_device(config, hardware, "cpu")
