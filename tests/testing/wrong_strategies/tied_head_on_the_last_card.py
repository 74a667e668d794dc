"""Wrong: puts the head on the last card, also when it is the embedding itself."""

from dataclasses import replace

from plugins.auto_shard import load as load
from plugins.auto_shard import place_inputs as place_inputs
from plugins.auto_shard import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def plan(config, hardware):  # wrong
    from service.placement import planning

    made = planning.spread(config, hardware)
    if not hardware.gpus:
        return made
    module_map = {**made.module_map, "lm_head": hardware.gpus[-1].id}
    return replace(
        made,
        module_map=module_map,
        load_kwargs={**made.load_kwargs, "device_map": module_map},
    )
