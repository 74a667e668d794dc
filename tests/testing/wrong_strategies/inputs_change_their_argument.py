"""Wrong: works in the tensors it was given."""

from plugins.cpu import load as load
from plugins.cpu import plan as plan
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def place_inputs(model, inputs):  # wrong
    inputs["position_ids"].add_(1)
    return dict(inputs)
