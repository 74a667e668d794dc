"""Wrong: on two cards it cuts a layer between attention and MLP, and so a residual sum."""

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
    parts = {
        "model.layers.1.input_layernorm": "cuda:0",
        "model.layers.1.self_attn": "cuda:0",
        "model.layers.1.post_attention_layernorm": "cuda:1",
        "model.layers.1.mlp": "cuda:1",
    }
    whole = {name: device for name, device in made.module_map.items() if name != "model.layers.1"}
    return replace(
        made,
        module_map={**whole, **parts},
        load_kwargs={**made.load_kwargs, "device_map": {**whole, **parts}},
    )
