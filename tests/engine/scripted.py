"""A runner without a model: after token n comes n + 1. Tests hold its steps, or make them raise.

All but the forward is real: memory, choice of tokens, halving of batches that fail. In place of
keys and values the tokens themselves are kept, so that every step checks that it finds the tokens
before its own where the memory says they are.
"""

import threading
from collections.abc import Callable
from collections.abc import Sequence as List
from types import SimpleNamespace
from typing import Any

import torch

from service.engine.engine import Engine
from service.engine.pages import Group
from service.engine.pages import PageHold
from service.engine.pages import Pages
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Batch
from service.engine.scheduler import Memory
from service.engine.scheduler import Piece
from service.engine.sequence import Sequence
from service.engine.sequence import Stream
from service.engine.slots import SlotHold
from service.engine.slots import Slots
from service.placement import kv

WAIT_S = 120.0  # never reached unless something is broken

Hook = Callable[[Batch], None]


class Kept:
    """Stands in for the tensors of a cache: the token at every place of every slot or page."""

    def __init__(self, windows: List[int | None] = (None,)) -> None:
        """windows: per group of pages, how far back a token sees."""
        self._windows = windows
        self._tokens: dict[tuple[int, int, int], int] = {}  # group, slot or page, place

    def compute(self, piece: Piece) -> None:
        """Check the tokens that the piece sees, then keep its own. Raises AssertionError."""
        self._copy(piece.sequence.hold)
        for group, window in enumerate(self._windows):
            for position in range(piece.start):
                if window is None or position > piece.start - window:
                    found = self._tokens.get(self._place(piece.sequence, group, position))
                    wanted = piece.sequence.ids(position, position + 1)[0]
                    assert found == wanted, f"{found} instead of {wanted} at {position}"
            for offset, token in enumerate(piece.ids):
                place = self._place(piece.sequence, group, piece.start + offset)
                self._tokens[place] = token

    def _copy(self, hold: object) -> None:
        if isinstance(hold, SlotHold) and hold.copy_from is not None:
            for place in range(hold.copied):
                self._tokens[0, hold.slot, place] = self._tokens[0, hold.copy_from, place]
            hold.copy_from = None

    def _place(self, sequence: Sequence, group: int, position: int) -> tuple[int, int, int]:
        hold = sequence.hold
        if isinstance(hold, SlotHold):
            return group, hold.slot, position
        assert isinstance(hold, PageHold)
        page = hold.tables[group][position // kv.PAGE_TOKENS]
        return group, page, position % kv.PAGE_TOKENS


class ScriptedPath:
    """Stands in for `Ragged`: logits that say which token comes next."""

    name = "scripted"
    why = ""
    together = True
    graphs = None
    compiled = None

    def __init__(self, runner: "ScriptedRunner", memory: Memory, step_tokens: int) -> None:
        self.memory = memory
        self.step_tokens = step_tokens
        self.score_tokens = step_tokens
        self._runner = runner
        self._kept = Kept()

    @property
    def kv_bytes(self) -> dict[str, int]:
        return {}

    def logits(self, batch: Batch) -> tuple[tuple[Piece, ...], torch.Tensor]:
        self._runner.note(batch)
        for piece in batch.pieces:
            self._kept.compute(piece)
        sampling = tuple(piece for piece in batch.pieces if piece.samples)
        rows = torch.zeros(len(sampling), self._runner.vocabulary)
        for row, piece in zip(rows, sampling, strict=True):
            row[(piece.ids[-1] + 1) % len(row)] = 10.0
            if self._runner.sick in piece.ids:
                row[0] = torch.nan
        return sampling, rows

    def undo(self) -> None:
        """Nothing to do: tokens are written to their own places."""

    def release(self) -> None:
        self._runner.threads.add(threading.current_thread())
        self._runner.released = True


class ScriptedRunner(Runner):
    """A `Runner` over a ScriptedPath.

    before_step: called with the batch of every forward, on the engine thread; what it raises, the
    forward raises. sick: a token that makes its sequence's logits NaN. broken: what trying the
    model raises. steps: the batch of every forward. trials: how often the model was tried.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 100,
        capacity: int = 1000,
        max_sequences: int = 2,
        step_tokens: int = 512,
        kv_tokens: int | None = None,
        paged: bool = False,
        before_step: Hook | None = None,
        sick: int = -1,
    ) -> None:
        config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=capacity)
        config.get_text_config = lambda **_: config
        model: Any = SimpleNamespace(config=config, can_generate=lambda: True)
        super().__init__(
            model,
            lambda *, model, inputs: dict(inputs),
            max_context=capacity,
            max_sequences=max_sequences,
            kv_tokens=kv_tokens,
        )
        pages = Group(kv.pages(kv_tokens or capacity * max_sequences))
        self.memory: Memory = Pages([pages]) if paged else Slots(max_sequences, share=True)
        self.before_step = before_step
        self.sick = sick
        self.broken: BaseException | None = None
        self.steps: list[Batch] = []
        self.trials = 0
        self.released = False
        self.threads: set[threading.Thread] = set()
        self._scripted_step_tokens = step_tokens

    def note(self, batch: Batch) -> None:
        """A forward begins."""
        self.threads.add(threading.current_thread())
        if any(piece.sequence.id < 0 for piece in batch.pieces):
            return  # a trial
        self.steps.append(batch)
        if self.before_step is not None:
            self.before_step(batch)

    @property
    def pieces(self) -> list[tuple[int, tuple[int, ...], int]]:
        """Of all forwards: sequence id, token ids and where they start."""
        return [(p.sequence.id, p.ids, p.start) for batch in self.steps for p in batch.pieces]

    def try_out(self) -> None:
        self.trials += 1
        if self.broken is not None:
            raise self.broken
        super().try_out()

    def _find_path(self) -> ScriptedPath:
        return ScriptedPath(self, self.memory, self._scripted_step_tokens)


class Gate:
    """Holds the engine inside a step until the test lets it go on. Pass it as `before_step`, or
    call it from what a step does.
    """

    def __init__(self) -> None:
        self._entered = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self._open = False

    def __call__(self, batch: Batch | None) -> None:
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


def fail_on(token: int, error: BaseException) -> Hook:
    """Every forward in which the token occurs raises the error."""

    def before_step(batch: Batch) -> None:
        if any(token in piece.ids for piece in batch.pieces):
            raise error

    return before_step


def greedy(max_tokens: int, *, stop_ids: List[int] = ()) -> SamplingParams:
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
