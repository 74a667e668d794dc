"""Wrong: its map for several cards has no device for the last norm."""

from dataclasses import replace

from plugins.auto_shard import load as load
from plugins.auto_shard import place_inputs as place_inputs
from plugins.auto_shard import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def plan(config, hardware):  # wrong
    from service.placement import planning

    made = planning.spread(config, hardware)
    if len(hardware.gpus) < 2:
        return made
    module_map = {name: device for name, device in made.module_map.items() if "norm" not in name}
    return replace(
        made,
        module_map=module_map,
        load_kwargs={**made.load_kwargs, "device_map": module_map},
    )
