"""Wrong: a layer rests on disk, and the plan does not say that this is meant."""

from dataclasses import replace

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def plan(config, hardware):  # wrong
    from service.placement import planning

    made = planning.mapped(config, hardware, {"": "cpu", "model.layers.1": "disk"})
    return replace(made, allows=frozenset())
