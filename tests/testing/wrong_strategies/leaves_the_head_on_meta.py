"""Wrong: a head that is never materialised, which answers with garbage and raises nothing."""

from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def load(config, placement):  # wrong
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)
    model.lm_head.to("meta")
    return model
