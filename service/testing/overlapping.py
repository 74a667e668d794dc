"""Overlap two loads at a chosen point, instead of hoping for it."""

import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers import LlamaForCausalLM
from transformers import PreTrainedModel
from transformers import initialization

# nothing waits this long unless it has failed
PATIENCE_S = 60.0


def waited(event: threading.Event) -> None:
    """Wait for an event. Raises TimeoutError if it does not come."""
    if not event.wait(PATIENCE_S):
        raise TimeoutError(f"nothing happened for {PATIENCE_S:.0f} s")


@contextmanager
def during_construction(act: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Call `act(construct)` in place of each construction of a Llama inside `from_pretrained`,
    where loader globals are swapped; `act` calls `construct()` when it wants the model built.
    """
    original = LlamaForCausalLM.__init__

    def init(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> None:
        act(lambda: original(self, *args, **kwargs))

    setattr(LlamaForCausalLM, "__init__", init)  # noqa: B010 - mypy forbids the plain assignment
    try:
        yield
    finally:
        setattr(LlamaForCausalLM, "__init__", original)  # noqa: B010


def overlapping_loads(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two plain loads in threads: the second begins inside the first and ends after it.

    Each restores what it found: the second found the first's swapped functions. Returns both
    models; the process stays poisoned.
    """
    inside, both, first_done = threading.Event(), threading.Barrier(2), threading.Event()
    models: dict[str, PreTrainedModel] = {}

    def act(construct: Callable[[], None]) -> None:
        inside.set()
        both.wait(PATIENCE_S)
        construct()
        if threading.current_thread().name == "second":
            waited(first_done)

    def first() -> None:
        models["first"] = AutoModelForCausalLM.from_pretrained(folder)
        first_done.set()

    def second() -> None:
        waited(inside)
        models["second"] = AutoModelForCausalLM.from_pretrained(folder)

    with during_construction(act):
        threads = [
            threading.Thread(target=first, name="first"),
            threading.Thread(target=second, name="second"),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    return models["first"], models["second"]


class ForeignLoad:
    """Somebody else's load in another thread, as far as loader globals go: `enter` swaps weight
    tying out, `leave` puts back what was there when it entered. Both return when it is done.
    """

    def __init__(self) -> None:
        self._entered, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="foreign load", daemon=True)

    def _run(self) -> None:
        with initialization.no_tie_weights():
            self._entered.set()
            self._leave.wait(PATIENCE_S)

    def enter(self) -> None:
        self._thread.start()
        waited(self._entered)

    def leave(self) -> None:
        self._leave.set()
        self._thread.join(PATIENCE_S)
