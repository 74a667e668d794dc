"""Wrong: forgets that buffers can be on meta too."""

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from service.placement.hookspecs import hookimpl


@hookimpl
def validate(model, placement):  # wrong
    from service.errors import PlacementMismatch

    lost = [name for name, weight in model.named_parameters() if weight.is_meta]
    if lost:
        raise PlacementMismatch("weights are on meta", tensors=lost)
