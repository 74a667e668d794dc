"""Linear layers whose weight is read past them, and which therefore cannot be quantised.

A Mamba mixer multiplies with `dt_proj.weight` itself; a quantised one is packed bytes there. Found
in the code of the model's modules, then confirmed by a forward of a few tokens.
"""

import dis
import functools
import inspect
from collections.abc import Collection
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# tokens of the forward that confirms
TOKENS = 4
# methods that run once, before a model is quantised
ONCE = ("__init__", "_init_weights", "reset_parameters")


def read_past(model: Any, linears: Collection[str]) -> tuple[str, ...]:
    """Names of those of `linears` whose weight is used by another module's forward.

    model: on one device, or a skeleton on meta; it is run if its code reads any. Where it cannot
    be run, all that the code reads count.
    """
    found = [name for name in linears if _mentioned(model, name)]
    return _used(model, found) if found else ()


def _mentioned(model: Any, name: str) -> bool:
    parent, _, key = name.rpartition(".")
    kind: Any = type(model.get_submodule(parent))
    return key in _reads(kind)


@functools.cache
def _reads(kind: Any) -> frozenset[str]:
    """Children whose `.weight` the methods of a class read: `self.<child>.weight`."""
    return frozenset(
        child
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if name not in ONCE and method.__module__ == kind.__module__
        for child in _chains(method)
    )


def _chains(method: Any) -> Iterator[str]:
    """x of every `something.x.weight` in the code of a function."""
    before = ""
    for step in dis.get_instructions(inspect.unwrap(method)):
        attribute = str(step.argval) if step.opname == "LOAD_ATTR" else ""
        if attribute == "weight" and before:
            yield before
        before = attribute


def _used(model: Any, names: list[str]) -> tuple[str, ...]:
    """Those whose weight is read in a forward while their own is not running."""
    modules = {id(model.get_submodule(name)): name for name in names}
    read: set[str] = set()
    inside: set[int] = set()

    class Watched(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            inside.add(id(self))
            try:
                return super().forward(input)
            finally:
                inside.discard(id(self))

        def __getattribute__(self, name: str) -> Any:
            if name == "weight" and id(self) not in inside:
                read.add(modules[id(self)])
            return super().__getattribute__(name)

    device = next(model.parameters()).device
    ids = torch.ones(1, TOKENS, dtype=torch.int64, device=device)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    kinds = {name: type(model.get_submodule(name)) for name in names}
    training = model.training
    model.eval()  # to train, a mixer reads the weights of all its layers
    try:
        for name in names:
            model.get_submodule(name).__class__ = Watched
        with torch.inference_mode():
            model(input_ids=ids, **more)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return tuple(names)
    finally:
        model.train(training)
        for name in names:
            model.get_submodule(name).__class__ = kinds[name]
    return tuple(name for name in names if name in read)
