"""One forward under a dispatch mode that sees every operator: the strongest single check.

A weight that was left on meta usually raises nothing, on CPU or GPU: the result is uninitialised
memory with the right shape and device. The mode sees the meta tensor go in.
"""

import inspect
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from service.errors import PlacementMismatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# these move or make tensors without computing with their values; offload hooks use them on meta
_MOVERS = frozenset(
    (
        "_to_copy",
        "copy_",
        "detach",
        "alias",
        "empty_like",
        "empty_strided",
        "new_empty",
        "to",
        "set_",
        "device",
    )
)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at the first operator that reads a meta tensor or mixes devices, naming the module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules: list[str] = []
        self.operators = 0
        # the module whose operator raised; the stack has unwound when anybody asks
        self.failed_in: str | None = None
        # the innermost of the modules that ended without a result just now: the one that raises
        self.left_with_nothing: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name not in _MOVERS:
            self.operators += 1
            self._look(name, [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)])
        try:
            return func(*args, **kwargs)
        except Exception:  # an operator may raise anything; whose it was is known only here
            self.failed_in = self.failed_in or (self.modules[-1] if self.modules else None)
            raise

    def _look(self, operator: str, tensors: list[torch.Tensor]) -> None:
        where = self.modules[-1] if self.modules else "the model"
        if any(t.device.type == "meta" for t in tensors):
            raise PlacementMismatch(
                f"{where} computes ({operator}) with a tensor on meta (F1): its values were never "
                "materialised, the answer would be uninitialised memory",
                failure_class="F1",
                tensors=[where],
            )
        # a CPU scalar may join tensors of any device, and so may a CPU index: torch's own rules
        devices = {str(t.device) for t in tensors if t.dim() > 0 or t.device.type != "cpu"}
        if operator.startswith("index"):
            devices.discard("cpu")
        if len(devices) > 1:
            raise PlacementMismatch(
                f"{where} mixes {' and '.join(sorted(devices))} in one operation ({operator})",
                failure_class="F17",
                tensors=[where],
            )


@contextmanager
def _named(model: torch.nn.Module, watch: _Watch) -> Iterator[None]:
    """Keep the names of the modules being run in `watch.modules`, innermost last.

    Wraps nothing: hooks are registered and removed, so offload hooks that replace `forward` still
    run.
    """
    handles = []
    stack = watch.modules
    for name, module in model.named_modules():

        def enter(_module: Any, _args: Any, name: str = name) -> None:
            stack.append(name or type(model).__name__)
            watch.left_with_nothing = None

        def leave(_module: Any, _args: Any, output: Any) -> None:
            left = stack.pop()
            if output is None and watch.left_with_nothing is None:
                watch.left_with_nothing = left

        # first of all, because `leave` runs also when somebody else's hook raises
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[_Watch]:
    """See every operator of the model's forwards; raises PlacementMismatch as `forward` does."""
    watch = _Watch()
    with torch.inference_mode(), _named(model, watch), watch:
        yield watch


def forward(
    model: "PreTrainedModel", inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Run one traced forward.

    inputs: placed, input_ids int64 [1, tokens].
    Returns logits [1, tokens, vocabulary] and the number of operators seen. Raises
    PlacementMismatch, naming the module (F1: an operator read a meta tensor; F17: devices were
    mixed; F14: a quantised layer cannot run; no class: another module's operator raised), or
    whatever else the model raises.
    """
    watch = _Watch()
    try:
        with torch.inference_mode(), _named(model, watch), watch:
            logits: torch.Tensor = _answer(model(**inputs, **_uncached(model)))
    except PlacementMismatch:
        raise
    except Exception as error:  # a model may raise anything; the operator gets the module's name
        failed_in = watch.failed_in or _quantised(model, watch.left_with_nothing)
        if failed_in is None:
            raise
        raise _cannot_run(model, failed_in, error) from error
    return logits, watch.operators


def _uncached(model: torch.nn.Module) -> dict[str, bool]:
    """No cache is made; an encoder's forward does not know the word."""
    names = inspect.signature(model.forward).parameters
    return {"use_cache": False} if {"use_cache", "kwargs"} & names.keys() else {}


def _answer(output: Any) -> torch.Tensor:
    """Logits, or the hidden states of a model without a head."""
    logits = getattr(output, "logits", None)
    values: torch.Tensor = output.last_hidden_state if logits is None else logits
    return values


def _quantised(model: torch.nn.Module, name: str | None) -> str | None:
    """`name` if it is of a quantised layer: bitsandbytes refuses some sizes before any operator."""
    module = dict(model.named_modules()).get(name or "")
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return name if state is not None else None


def _cannot_run(model: torch.nn.Module, name: str, error: Exception) -> PlacementMismatch:
    words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    module = dict(model.named_modules()).get(name)
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
        return PlacementMismatch(f"{name} cannot run: {words}", tensors=[name])
    size, block = getattr(module, "in_features", "?"), getattr(state, "blocksize", "?")
    fact = f"its input size is {size}"
    if isinstance(size, int) and isinstance(block, int) and size % block == 0:
        fact = f"its output size is {getattr(module, 'out_features', '?')}"
    return PlacementMismatch(
        f"{name} is quantised and cannot run: {fact} and the block size is {block} (F14); {words}",
        hint="set quantize: none or int8, or take a model whose sizes are multiples of the block "
        "size",
        failure_class="F14",
        tensors=[f"{name}.weight"],
    )
