"""Wrong: swaps tying out for a quicker load and forgets to put it back."""

from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def load(config, placement):  # wrong
    from transformers import AutoModelForCausalLM
    from transformers import PreTrainedModel

    model = AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)
    PreTrainedModel.tie_weights = lambda self, *args, **kwargs: None
    return model
