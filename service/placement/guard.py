"""The load lock, and the loader globals that overlapping loads leave poisoned (F4, F5).

`from_pretrained` swaps functions of torch and transformers for the time of a load: weight tying,
the registration of parameters, initialisers, the default dtype. Two loads that overlap restore
each other's swap, and the process stays broken for every later load. So every load and every
skeleton is built under one lock, and what could be swapped is compared with what it was when this
module was imported.

A model may be loaded while another one serves. Then `stillness` keeps its steps out of the short
time in which a load has swapped what a forward may use, above all the default number format.

The lock, the record and the stillness are module state because what they guard is global to the
process.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import accelerate.big_modeling
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization

from service.errors import LoadFailed

# re-entrant: a strategy may look at the model's shape again while it loads
LOAD_LOCK = threading.RLock()


class Stillness:
    """Steps of serving models on one side, a load that has swapped globals on the other: many steps
    at once, but none while anything is swapped. Any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stepping: list[int] = []
        self._still: int | None = None
        self._depth = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a step inside. Waits while another thread keeps them out."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._still in (None, me))
            self._stepping.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._stepping.remove(me)
                self._changed.notify_all()

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Swap globals inside: waits for running steps to end, lets none begin. May be nested."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._still in (None, me))
            self._still = me
            self._depth += 1
            self._changed.wait_for(lambda: set(self._stepping) <= {me})
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._still = None
                self._changed.notify_all()


stillness = Stillness()


@dataclass(frozen=True)
class Global:
    """One function that loaders swap."""

    owner: Any
    name: str
    value: Any

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}"


def _record() -> tuple[Global, ...]:
    """Everything that transformers.initialization and accelerate.init_empty_weights swap."""
    watched: list[tuple[Any, str]] = [
        (PreTrainedModel, "tie_weights"),
        (PreTrainedModel, "init_weights"),
        (nn.Module, "register_parameter"),
        (nn.Module, "register_buffer"),
        (accelerate.big_modeling, "check_device_map"),
        *((torch, name) for name in ("linspace", "empty", "zeros", "ones", "full")),
    ]
    for module_name in getattr(initialization, "TORCH_MODULES_TO_PATCH", ("torch.nn.init",)):
        module = sys.modules.get(module_name)
        for name in initialization.TORCH_INIT_FUNCTIONS:
            if module is not None and hasattr(module, name):
                watched.append((module, name))
    return tuple(Global(owner, name, vars(owner)[name]) for owner, name in watched)


_PRISTINE = _record()
_DEFAULT_DTYPE = torch.float32
# a swapped function betrays itself by its name; then there is nothing good to compare with
_FOREIGN = [
    str(g)
    for g in _PRISTINE
    if isinstance(g.owner, type)
    and getattr(g.value, "__qualname__", "") != f"{g.owner.__name__}.{g.name}"
]


def swapped() -> Iterator[Global]:
    """The watched functions that are not what they were at import."""
    return (g for g in _PRISTINE if vars(g.owner)[g.name] is not g.value)


def findings() -> list[str]:
    """What is poisoned, by name; empty when all is pristine."""
    names = [*_FOREIGN, *(str(g) for g in swapped())]
    if torch.get_default_dtype() != _DEFAULT_DTYPE:
        names.append(f"torch default dtype is {torch.get_default_dtype()}")
    return names


def watched_count() -> int:
    """How many globals `findings` compares."""
    return len(_PRISTINE) + 1


def heal() -> list[str]:
    """Restore every watched global; return what was poisoned. Hold LOAD_LOCK.

    Raises LoadFailed when the process was already poisoned before this module was imported.
    """
    if _FOREIGN:
        raise LoadFailed(
            "another load was under way when Moorage was imported; "
            f"{', '.join(_FOREIGN)} cannot be restored",
            hint="restart the process and import service before loading models",
            failure_class="F4",
        )
    names = findings()
    for g in swapped():
        setattr(g.owner, g.name, g.value)
    torch.set_default_dtype(_DEFAULT_DTYPE)
    return names
