"""Wrong: everything is where it should be, and one weight is another one."""

from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def load(config, placement):  # wrong
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)
    return model
