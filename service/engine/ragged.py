"""The fast path: all sequences of a step in one row of tokens, through the unmodified model."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any
from typing import Protocol

import torch

from service.engine import attention
from service.engine import scoring
from service.engine.attention import Layer
from service.engine.attention import NotCarried
from service.engine.scheduler import Batch
from service.engine.scheduler import Memory
from service.engine.scheduler import Piece
from service.engine.slot_cache import SlotStep
from service.placement import kv
from service.placement.inputs import PlaceInputs
from service.placement.inputs import place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from service.engine.compiling import Compiled
    from service.engine.graphs import Graphs
    from service.engine.segments import Segments


# the model, or what is called in its place: gives an object with `logits`
Run = Callable[..., Any]

# kinds of layers whose mask is known from what they hand over
KINDS = ("full_attention", "sliding_attention")


class Cache(Protocol):
    """Tensors of keys and values, and how a step uses them."""

    @property
    def bytes(self) -> dict[str, int]: ...

    def order(self, batch: Batch) -> tuple[Piece, ...]:
        """The decodes in the order of their rows."""

    def step(self, decodes: tuple[Piece, ...], prefills: tuple[Piece, ...]) -> attention.Step:
        """What the attention layers of this step see."""


class Ragged:
    """Runs a batch in one forward. Engine thread only.

    graphs: captured decode steps, and segments: steps with prompts, where the device has them.
    compiled: what is called in place of the model, where the deployment wants it. All are set by
    the runner.
    """

    name = "ragged"
    why = ""
    together = True

    def __init__(
        self,
        model: "PreTrainedModel",
        place_inputs: PlaceInputs,
        memory: Memory,
        cache: Cache,
        *,
        step_tokens: int,
    ) -> None:
        """Gives the model's attention layers our function, until `release`."""
        self.graphs: Graphs | None = None
        self.segments: Segments | None = None
        self.memory = memory
        self.step_tokens = step_tokens
        self.score_tokens = min(step_tokens, kv.SCORE_TOKENS)
        self.compiled: Compiled | None = None
        self._model = model
        self._place_inputs = place_inputs
        self._cache = cache
        self._step: attention.Step | None = None  # the last one
        self._before: str = use(model, attention.NAME)

    @property
    def kv_bytes(self) -> dict[str, int]:
        """Bytes of keys and values reserved, by device."""
        return self._cache.bytes

    def logits(self, batch: Batch) -> tuple[tuple[Piece, ...], torch.Tensor]:
        """The pieces of the batch that sample, and their logits, [pieces, vocabulary].

        Prompts whose logprobs are wanted are scored.
        """
        decodes = self._cache.order(batch)
        ids, positions, keep, sampling = flatten(decodes, batch.prefills)
        self._step = self._cache.step(decodes, batch.prefills)
        with attention.bound(self._step):
            inputs = placed(self._model, self._place_inputs, ids, positions)
            rows = forward(self.segments or self.compiled or self._model, inputs, keep)
        scoring.score(batch.prefills, rows[len(sampling) :])
        return sampling, rows[: len(sampling)]

    def undo(self) -> None:
        """Make the last batch one that can be run again: what it wrote over is brought back."""
        if isinstance(self._step, SlotStep):
            with torch.inference_mode():
                self._step.undo()

    def release(self) -> None:
        """Give the model its own attention back and drop the cache."""
        use(self._model, self._before)
        self.graphs = self.segments = None
        if self.compiled is not None:
            self.compiled.release()
            self.compiled = None
        del self._cache, self._model
        self._step = None


def flatten(
    decodes: tuple[Piece, ...], prefills: tuple[Piece, ...]
) -> tuple[list[int], list[int], list[int], tuple[Piece, ...]]:
    """Tokens of a step, their positions, the rows whose logits are wanted, and whose those are.

    Rows that score a prompt come after those that sample, in the order of the prefills.
    """
    ids: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    sampling: list[Piece] = []
    for piece in (*decodes, *prefills):
        ids += piece.ids
        positions += range(piece.start, piece.start + len(piece.ids))
        if piece.samples:
            keep.append(len(ids) - 1)
            sampling.append(piece)
    first = len(decodes)
    for piece in prefills:
        keep += (first + position - piece.start for position in scoring.wanted(piece))
        first += len(piece.ids)
    return ids, positions, keep, tuple(sampling)


def placed(
    model: "PreTrainedModel", place_inputs: PlaceInputs, ids: list[int], positions: list[int]
) -> dict[str, torch.Tensor]:
    """The inputs of one flattened step where the strategy puts them, int64 [1, T]."""
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    return place(place_inputs, model, inputs)


def forward(run: Run, inputs: Mapping[str, torch.Tensor], keep: list[int]) -> torch.Tensor:
    """Logits of the rows `keep` of one flattened step, [rows, vocabulary], where the head is."""
    wanted = torch.tensor(keep or [0])  # of a step that samples nothing, one row is thrown away
    output = run(**inputs, use_cache=False, return_dict=True, logits_to_keep=wanted)
    logits: torch.Tensor = output.logits[0]
    return logits[: len(keep)]


def layers_of(model: "PreTrainedModel", place_inputs: PlaceInputs) -> Mapping[int, Layer]:
    """What every attention layer hands over, found by a forward of two tokens.

    Raises NotCarried if that is nothing the fast path can compute.
    """
    trial = attention.Trial()
    before = use(model, attention.NAME)
    try:
        with attention.bound(trial):
            forward(model, placed(model, place_inputs, [0, 0], [0, 1]), [1])
    finally:
        use(model, before)
    config = model.config.get_text_config(decoder=True)
    expected = config.num_hidden_layers
    if sorted(trial.layers) != list(range(expected)):
        raise NotCarried(f"{len(trial.layers)} of its {expected} layers have plain attention")
    # a short trial cannot see a window that only the model's own mask would apply
    told = {layer.window for layer in trial.layers.values()}
    for size in trial.masked - told:
        raise NotCarried(f"its mask has a window of {size} that its layers do not tell")
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        windowed = trial.layers[index].window is not None
        if kind not in KINDS or (kind == "sliding_attention") != windowed:
            raise NotCarried(f"layer {index} is {kind}, but does not tell its window")
    return trial.layers


def use(model: "PreTrainedModel", name: str) -> str:
    """Have the model use an attention implementation; returns the name of the one before.

    Raises NotCarried if the model does not ask transformers for its attention function.
    """
    before = str(model.config._attn_implementation)
    if name != before:
        if not model._can_set_attn_implementation():
            raise NotCarried(f"{type(model).__name__} brings an attention function of its own")
        model.set_attn_implementation(name)
    return before
