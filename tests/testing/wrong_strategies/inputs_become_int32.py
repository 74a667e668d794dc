"""Wrong: ids in another type."""

from plugins.cpu import load as load
from plugins.cpu import plan as plan
from plugins.cpu import validate as validate
from service.placement.hookspecs import hookimpl


@hookimpl
def place_inputs(model, inputs):  # wrong
    import torch

    return {name: tensor.to(torch.int32) for name, tensor in inputs.items()}
