"""Wrong: looks at nothing."""

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from service.placement.hookspecs import hookimpl


@hookimpl
def validate(model, placement):  # wrong
    pass
