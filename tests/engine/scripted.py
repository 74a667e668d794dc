"""A runner without a model: after token n comes n + 1. Tests hold its steps, or make them raise."""

import threading
from collections.abc import Callable
from collections.abc import Sequence

import torch

from service.engine.engine import Engine
from service.engine.sequence import SamplingParams
from service.engine.sequence import Stream

WAIT_S = 30.0  # never reached unless something is broken


class ScriptedRunner:
    """Stands in for `Runner`.

    before_step: called with (sequence id, ids, start) in every step, on the engine thread; what it
    raises, the step raises. steps: every step, with the same three. freed: sequence ids, in order.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 100,
        capacity: int = 1000,
        before_step: Callable[[int, tuple[int, ...], int], None] | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.capacity = capacity
        self.before_step = before_step
        self.steps: list[tuple[int, tuple[int, ...], int]] = []
        self.freed: list[int] = []
        self.caches: dict[int, int] = {}
        self.warm_ups = 0
        self.broken: BaseException | None = None
        self.threads: set[threading.Thread] = set()

    @property
    def kv_tokens(self) -> int:
        return sum(tuple(self.caches.values()))

    def release(self) -> None:
        self.threads.add(threading.current_thread())
        self.caches.clear()

    def warm_up(self) -> None:
        self.threads.add(threading.current_thread())
        self.warm_ups += 1
        if self.broken is not None:
            raise self.broken

    def step(self, sequence_id: int, ids: Sequence[int], start: int) -> torch.Tensor:
        self.threads.add(threading.current_thread())
        self.steps.append((sequence_id, tuple(ids), start))
        if self.caches.get(sequence_id, 0) != start:
            raise RuntimeError(f"out of order: {sequence_id} at {start}")
        if self.before_step is not None:
            self.before_step(sequence_id, tuple(ids), start)
        self.caches[sequence_id] = start + len(ids)
        logits = torch.zeros(self.vocabulary)
        logits[(ids[-1] + 1) % self.vocabulary] = 10.0
        return logits

    def free(self, sequence_id: int) -> None:
        self.threads.add(threading.current_thread())
        self.freed.append(sequence_id)
        self.caches.pop(sequence_id, None)


class Gate:
    """Holds the engine inside a step until the test lets it go on. Pass it as `before_step`."""

    def __init__(self) -> None:
        self._entered = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self._open = False

    def __call__(self, sequence_id: int, ids: tuple[int, ...], start: int) -> None:
        if not self._open:
            self._entered.release()
            if not self._permits.acquire(timeout=WAIT_S):
                raise TimeoutError("the test never let the step go on")

    def wait_inside(self) -> None:
        """Return when the engine is held inside a step."""
        if not self._entered.acquire(timeout=WAIT_S):
            raise TimeoutError("the engine never came to a step")

    def let_one_go(self) -> None:
        self._permits.release()

    def open(self) -> None:
        """Hold no step any more."""
        self._open = True
        self._permits.release()


def greedy(max_tokens: int, *, stop_ids: Sequence[int] = ()) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_ids=frozenset(stop_ids))


def read_all(stream: Stream) -> list[int]:
    """Every token until the end. Raises the error with which the stream ended."""
    tokens: list[int] = []
    while more := stream.read(WAIT_S):
        tokens += more
    return tokens


def idle(engine: Engine) -> bool:
    """Whether nothing is left of any sequence."""
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.kv_tokens) == (0, 0, 0)
