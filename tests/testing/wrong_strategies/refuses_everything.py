"""Wrong: takes a sound model for a broken one."""

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from service.placement.hookspecs import hookimpl


@hookimpl
def validate(model, placement):
    if not hasattr(model, "hf_device_map"):
        raise ValueError("the model was not dispatched")  # wrong
