"""What keeps one sequence's failure, and one model's thread, apart from all others."""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from service.engine.scheduler import Batch
from service.engine.scheduler import Piece
from service.errors import OutOfMemory
from service.errors import RequestError
from service.errors import StepFailed
from service.placement.loading import collect

if TYPE_CHECKING:
    from service.engine.runner import Result

log = logging.getLogger(__name__)


def apart(
    batch: Batch,
    run: "Callable[[Batch], list[tuple[Piece, Result]]]",
    *,
    together: bool,
    undo: Callable[[], None],
) -> "list[tuple[Piece, Result]]":
    """Run a batch. Never raises for what one sequence did: a batch that fails is run again in
    halves until the guilty one is found, and only that fails. A batch that is too large for the
    device's memory so becomes smaller ones that may fit, and what is too large alone fails.

    together: whether several pieces may be in one run. undo: called before a batch is run again.
    """
    alone = len(batch.pieces) == 1
    if together or alone:
        try:
            return run(batch)
        except RequestError as error:
            known: RequestError = error
        except Exception as error:  # the model and the strategy may raise anything
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                known = OutOfMemory("There was no memory to compute this request. Try again later.")
            else:
                known = StepFailed("The model failed on this request. The server's log says why.")
            if alone:
                log.exception("a step of sequence %d failed", batch.pieces[0].sequence.id)
            elif isinstance(known, OutOfMemory):
                log.warning("no memory for %d sequences: in two steps again", len(batch.pieces))
        # behind the handlers: what was raised kept the step's tensors
        if isinstance(known, OutOfMemory):
            collect()
        if alone:
            return [(batch.pieces[0], known)]
        undo()
    return [
        result
        for half in _halves(batch)
        for result in apart(half, run, together=together, undo=undo)
    ]


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    """The batch cut in two, of which each has at least one piece."""
    middle = len(batch.pieces) // 2
    cut = min(middle, len(batch.decodes))
    return (
        Batch(batch.decodes[:cut], batch.prefills[: middle - cut]),
        Batch(batch.decodes[cut:], batch.prefills[middle - cut :]),
    )


class OwnThread:
    """The one thread that runs a model: the first that claims it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def claim(self) -> None:
        """Raise RuntimeError on any other thread.

        F6: with offload hooks a second thread would read weights that the first is moving.
        """
        current = threading.current_thread()
        if self._thread is None:
            self._thread = current
        elif self._thread is not current:
            raise RuntimeError(
                f"thread {current.name} tried to run the model of thread {self._thread.name} (F6)"
            )
