"""The contract of a placement strategy: five hooks.

A strategy is a module (or an object) with these functions, each marked with `hookimpl`. `load`,
`validate` and `place_inputs` are required; `plan` and `release` have defaults. Ask only for the
arguments you need, by these names: pluggy passes arguments by name.

    from service.placement.hookspecs import hookimpl

    @hookimpl
    def load(config, placement): ...

Beside the hooks a module may have
    NAME        the name used in a config; default: the file's name with dashes
    Options     a pydantic model; `options:` of a deployment is checked by it and passed as
                `config.options`. Without it any option is refused
    DEFAULTS    deployment keys to this strategy's own defaults, such as {"quantize": "nf4"}
and the first line of its docstring is what `moorage plugins list` shows.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from service.config.schema import ModelConfig
    from service.placement.hardware import Hardware
    from service.placement.plan import Placement

PROJECT = "moorage"
ENTRY_POINT_GROUP = "moorage.strategies"
REQUIRED = ("load", "validate", "place_inputs")

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def plan(  # type: ignore[empty-body]
    config: "ModelConfig", hardware: "Hardware"
) -> "Placement":
    """Say where the model would go, without reading weights.

    Depends on its arguments only, so that a plan for a machine that is not here is the plan it
    would make there. Takes about a second. Default: the whole model on the first GPU if there is
    one, else on the CPU.

    config: the deployment, its model located in `config.folder`.
    hardware: devices and free bytes, this machine's or invented.
    Returns a Placement; its `load_kwargs` are what your `load` will use.
    Raises PlacementUnavailable (a device or package is missing) or DoesNotFit (too little memory),
    each with a hint.
    """


@hookspec(firstresult=True)
def load(config: "ModelConfig", placement: "Placement") -> "PreTrainedModel":
    """Load the model and return it in eval mode, placed as `placement` says.

    Called under the process-wide load lock, once per attempt. No tensor may be left on meta unless
    an offload hook owns it and `placement.allows` has "offload". Loader globals that you change
    must be restored.
    Raises anything; the attempt is then discarded, with the message shown to the operator.
    """


@hookspec(firstresult=True)
def validate(model: "PreTrainedModel", placement: "Placement") -> None:
    """Raise PlacementMismatch, naming tensors, unless all is where `placement` says.

    The core's own checks (F1-F22) run as well, whatever this hook does.
    """


@hookspec(firstresult=True)
def place_inputs(  # type: ignore[empty-body]
    model: "PreTrainedModel", inputs: "Mapping[str, Tensor]"
) -> "dict[str, Tensor]":
    """Put the inputs of one step where the model expects them, and return them.

    inputs: CPU tensors by name: input_ids int64 [batch, tokens] and whatever else the step has.
    Returns a new dict with the same keys, shapes, dtypes and values; the argument is left
    unchanged. Hot path: called once per engine step, on the engine thread; no synchronisation, no
    logging. Never use `model.device`: with an offloaded embedding it is meta.
    """


@hookspec
def release(model: "PreTrainedModel") -> None:
    """Undo what `load` did beyond allocating memory. Default: nothing."""
