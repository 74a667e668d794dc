"""Wrong: its plan depends on a variable."""

import os

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def plan(config, hardware):
    from service.placement import planning

    device = os.environ.get("MY_DEVICE", "cpu")  # wrong
    return planning.on_one_device(config, hardware, device)
