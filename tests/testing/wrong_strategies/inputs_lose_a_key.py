"""Wrong: only the ids arrive."""

from plugins.cpu import load as load
from plugins.cpu import plan as plan
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def place_inputs(model, inputs):  # wrong
    return {"input_ids": inputs["input_ids"]}
