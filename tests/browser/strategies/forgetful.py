"""A strategy that leaves a parameter on meta: its model is never proven (F1)."""

from service.placement import checks
from service.placement import planning
from service.placement.hookspecs import hookimpl
from service.placement.inputs import to_input_device


@hookimpl
def plan(config, hardware):
    return planning.on_one_device(config, hardware, "cpu")


@hookimpl
def load(config, placement):
    from torch import nn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.to("meta"))
    return model


@hookimpl
def validate(model, placement):
    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    return to_input_device(model, inputs)
