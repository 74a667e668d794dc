"""Wrong: imports torch when it is only listed."""

import torch  # wrong

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from service.placement.hookspecs import hookimpl


@hookimpl
def validate(model, placement):
    from service.placement import checks

    checks.placed_as_planned(model, placement)
    torch.set_grad_enabled(False)
