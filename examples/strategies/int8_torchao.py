"""Weights in 8 bits by torchao (pip install torchao), spread over the GPUs, or in RAM without one.

Linear layers keep a row's numbers as int8 with one scale, and compute in the model's own format.
It plans like `quantize: int8` of bitsandbytes, which takes as many bytes, and loads with another
library: what differs is `quantization_config`.
"""

import dataclasses
import importlib.util

from service.errors import PlacementMismatch
from service.errors import PlacementUnavailable
from service.placement.hookspecs import hookimpl

DEFAULTS = {"quantize": "int8"}


@hookimpl
def plan(config, hardware):
    """Like auto-shard, with torchao's words instead of bitsandbytes'."""
    from service.placement import planning

    if config.quantize != "int8":
        raise PlacementUnavailable(
            f"strategy {config.strategy} cannot do quantize: {config.quantize}",
            hint="use quantize: int8, or another strategy",
        )
    if importlib.util.find_spec("torchao") is None:
        raise PlacementUnavailable(
            f"strategy {config.strategy} needs torchao, which is not installed.",
            hint="pip install torchao",
        )
    made = planning.spread(config, hardware)
    keep = made.load_kwargs["quantization_config"].llm_int8_skip_modules
    return dataclasses.replace(
        made, load_kwargs={**made.load_kwargs, "quantization_config": _int8(keep)}
    )


def _int8(keep):
    """torchao's settings. keep: modules to leave alone, None for those transformers keeps."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)


@hookimpl
def load(config, placement):
    """Exactly what was planned; every linear layer is quantised as soon as it is read."""
    from service.placement.architectures import auto_class

    return auto_class(config).from_pretrained(config.folder, **placement.load_kwargs)


@hookimpl
def validate(model, placement):
    """Where it was planned, and really in 8 bits."""
    from torchao.quantization import Int8Tensor

    from service.placement import checks

    checks.placed_as_planned(model, placement)
    found = sum(isinstance(weight, Int8Tensor) for weight in model.parameters())
    if found != placement.quantized:
        raise PlacementMismatch(
            f"{found} of {placement.quantized} linear layers are torchao's int8 (F13)",
            failure_class="F13",
        )


@hookimpl
def place_inputs(model, inputs):
    """To the device of the embedding."""
    from service.placement.inputs import to_input_device

    return to_input_device(model, inputs)
