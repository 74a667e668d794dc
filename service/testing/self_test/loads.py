"""Loads that disturb others, or leave something behind: F4, F5, F21."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel

from service.errors import LoadFailed
from service.placement import guard
from service.placement.certificate import certify
from service.testing.overlapping import PATIENCE_S
from service.testing.overlapping import during_construction
from service.testing.overlapping import overlapping_loads
from service.testing.placing import bring_up
from service.testing.placing import variant


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns when another thread runs it."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(PATIENCE_S)
    return found[0]


def locked() -> bool:
    """Whether somebody holds the load lock, as another thread sees it."""

    def free() -> bool:
        taken = guard.LOAD_LOCK.acquire(blocking=False)
        if taken:
            guard.LOAD_LOCK.release()
        return taken

    return not in_a_thread(free)


class Loads:
    """A strategy's `load` that makes a model, remembers it weakly, and then does something (F21).

    then: gets the model; what it returns or raises is what the hook returns or raises.
    """

    def __init__(self, then: Callable[[PreTrainedModel], Any]) -> None:
        self.model: weakref.ref[Any] | None = None
        self._then = then

    def __call__(self, config: Any, placement: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(config.folder)
        self.model = weakref.ref(model)
        return self._then(model)

    @property
    def alive(self) -> bool:
        """Whether the model still takes its memory."""
        gc.collect()
        return self.model is not None and self.model() is not None


def raising(kind: type[Exception], words: str) -> Callable[[PreTrainedModel], Any]:
    """For `Loads`: raise after the model was made."""

    def then(model: PreTrainedModel) -> Any:
        raise kind(words)

    return then


# --- the trials


def overlapping(folder: Path) -> tuple[bool, bool]:
    overlapping_loads(folder)
    there = bool(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.is_meta)
    seen = bool(guard.findings())
    loaded = bring_up(folder)
    model = loaded.model
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    return there, tied and certify(loaded).valid and seen == there


def seen_by_every_thread(folder: Path) -> tuple[bool, bool]:
    """Ours holds one lock while anything is built, and knows what is swapped meanwhile."""
    with init_empty_weights():
        there = bool(in_a_thread(lambda: nn.Linear(4, 4)).weight.is_meta)
    held: list[bool] = []

    def act(construct: Callable[[], None]) -> None:
        held.append(locked() and bool(guard.findings()))
        construct()

    with during_construction(act):
        loaded = bring_up(folder)
    inside: list[bool] = []
    loaded.model.register_forward_pre_hook(lambda module, args: inside.append(locked()))
    caught = certify(loaded).valid and all(inside) and bool(inside)
    return there, caught and held[-1] and not locked()


def kept_by_an_error(folder: Path) -> tuple[bool, bool]:
    load = Loads(raising(RuntimeError, "half-way"))
    plain = ours = None
    try:
        load(type("Config", (), {"folder": folder}), None)
    except RuntimeError as error:
        plain = error
    there = plain is not None and load.alive
    try:
        bring_up(folder, variant(load=load))
    except LoadFailed as error:
        ours = error
    return there, ours is not None and not load.alive and certify(bring_up(folder)).valid
