"""Owns a model that gives embeddings: texts in batches of similar length, one row for each.

The engine is the one that generates: to it, a text is a prompt that nothing follows.
"""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from service.engine import pooling
from service.engine import proof
from service.engine.isolating import OwnThread
from service.engine.isolating import apart
from service.engine.runner import Launched
from service.engine.runner import Result
from service.engine.scheduler import Batch
from service.engine.scheduler import Memory
from service.engine.scheduler import Piece
from service.engine.sequence import Sequence
from service.errors import InvalidRequest
from service.errors import LoadFailed
from service.errors import NonFiniteLogits
from service.errors import ServiceError
from service.models.sentence_files import SentenceFiles
from service.placement import architectures
from service.placement import guard
from service.placement import kv
from service.placement.inputs import PlaceInputs
from service.placement.inputs import input_device
from service.placement.inputs import place
from service.placement.inputs import send

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from service.engine.compiling import Compiled
    from service.engine.graphs import Graphs

log = logging.getLogger(__name__)

# a text is computed as a whole, so no step cuts one
UNCUT = 2**31


class NothingKept:
    """The memory of texts that nothing follows: there is none. See `scheduler.Memory`."""

    prefix_tokens = 0
    used_tokens = 0

    def admit(self, sequence: Sequence) -> bool:
        return True

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        return True

    def computed(self, sequence: Sequence) -> None:
        """Nothing to note."""

    def free(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Nothing to give back."""


@dataclass
class Way:
    """How texts are run: several in one forward, padded to the longest, or each alone.

    why: what keeps the model from the first, or "". The rest is what an engine asks of a path.
    """

    name: str
    why: str
    together: bool
    memory: Memory
    step_tokens: int = UNCUT
    score_tokens: int = 0
    graphs: "Graphs | None" = None
    compiled: "Compiled | None" = None

    @property
    def kv_bytes(self) -> dict[str, int]:
        return {}


PADDED, ALONE = "padded", "alone"


class EmbeddingRunner:
    """One model, run by one thread: the first that opens or steps it.

    vocabulary: token ids are below it. capacity: tokens of one text; `max_context`, or the model's
    own limit where that is lower. dimension: numbers of one embedding; 0 before `open`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        place_inputs: PlaceInputs,
        files: SentenceFiles,
        *,
        max_context: int,
        max_sequences: int = 8,
    ) -> None:
        """model: without a head, in eval mode, placed and proven. files: how a text's hidden
        states become its embedding. max_sequences: texts of one step.
        """
        text = model.config.get_text_config()
        limits = (
            max_context,
            architectures.context_limit(model.config),
            architectures.positions_of(model),
            files.max_tokens,
        )
        self.vocabulary: int = text.vocab_size
        self.capacity = min(limit for limit in limits if limit is not None)
        self.max_sequences = max_sequences
        self.dimension = 0
        # RoBERTa counts positions by it: another id there would be a token that has one
        padding = getattr(text, "pad_token_id", None)
        self._padding = 0 if padding is None or not 0 <= padding < self.vocabulary else padding
        on_cuda = input_device(model).type == "cuda"
        self._forward_tokens = kv.STEP_TOKENS["cuda" if on_cuda else "cpu"]
        self._files = files
        self._model: PreTrainedModel | None = model
        self._place_inputs = place_inputs
        self._way: Way | None = None
        self._thread = OwnThread()

    @property
    def path(self) -> Way:
        """How texts are run. Raises RuntimeError before `open` and after `release`."""
        if self._way is None:
            raise RuntimeError("this runner is not open")
        return self._way

    @property
    def way(self) -> Way | None:
        """The same, or None before `open` and after `release`. Any thread."""
        return self._way

    def open(self) -> None:
        """Embed a text, and find out whether texts may be padded to run together.

        Raises PluginError or LoadFailed, naming what is wrong, so that nothing is served that
        cannot run.
        """
        self._thread.claim()
        try:
            self._way = self._find_way()
        except ServiceError:
            raise
        except Exception as error:  # the model may raise anything; at start it all means the same
            raise LoadFailed(
                f"The first embedding could not be computed: {type(error).__name__}: {error}"
            ) from error
        if self._way.why:
            log.warning("texts are run one at a time: %s", self._way.why)

    def try_out(self) -> None:
        """Embed a short text. Raises LoadFailed or PluginError, or what the model raises."""
        self._thread.claim()
        rows = self._rows([proof.prompt_for(self.vocabulary, self.capacity)])
        if not rows.isfinite().all():
            raise LoadFailed("The first embedding has NaN or infinite values.")

    def launch(self, batch: Batch) -> Launched:
        """Begin a step; `collect` does it. Engine thread only."""
        self._thread.claim()
        return Launched(batch)

    def collect(self, launched: Launched) -> list[tuple[Piece, Result]]:
        """Put the embeddings of a step's texts on their streams; what failed, for every piece.

        Never raises for what one text did: see `isolating.apart`. Engine thread only.
        """
        self._thread.claim()
        return [
            result
            for part in self._forwards(launched.batch)
            for result in apart(part, self._run, together=self.path.together, undo=_nothing)
        ]

    def release(self) -> None:
        """Let go of the model: nothing is run after this. Engine thread."""
        self._way = None
        self._model = None

    def _forwards(self, batch: Batch) -> Iterator[Batch]:
        """The texts of a step in forwards of similar length, under a budget of padded tokens."""
        part: list[Piece] = []
        for piece in sorted(batch.pieces, key=lambda piece: len(piece.ids)):
            if part and (len(part) + 1) * len(piece.ids) > self._forward_tokens:
                yield Batch((), tuple(part))
                part = []
            part.append(piece)
        yield Batch((), tuple(part))

    def _run(self, batch: Batch) -> list[tuple[Piece, Result]]:
        if not all(piece.sequence.params.pooled for piece in batch.pieces):
            raise InvalidRequest("This model gives embeddings; it continues no text.")
        rows = self._rows([piece.ids for piece in batch.pieces])
        results: list[tuple[Piece, Result]] = []
        for piece, row, sound in zip(
            batch.pieces, rows, rows.isfinite().all(1).tolist(), strict=True
        ):
            if sound:
                piece.sequence.stream.embedding = row.numpy().astype("<f4").tobytes()
                results.append((piece, None))
            else:
                failed = "The model produced NaN or infinite values for this input."
                results.append((piece, NonFiniteLogits(failed)))
        return results

    def _rows(self, texts: List[tuple[int, ...]]) -> torch.Tensor:
        """Embeddings, float32 [texts, dimension] on the CPU."""
        model = self._model
        if model is None:
            raise RuntimeError("the model of this runner was released")
        longest = max(map(len, texts))
        ids = [[*text, *[self._padding] * (longest - len(text))] for text in texts]
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        given = {"input_ids": torch.tensor(ids), "attention_mask": mask}
        with guard.stillness.step(), torch.inference_mode():
            output = model(**place(self._place_inputs, model, given), return_dict=True)
            states = getattr(output, "last_hidden_state", None)
            if states is None:
                raise LoadFailed(
                    f"{type(model).__name__} gives no hidden states",
                    hint="return the model without a head from `load`: AutoModel's, as "
                    "service.placement.architectures.auto_class says",
                )
            rows = pooling.pool(states, send(mask, states.device), self._files.pooling)
            return (pooling.scaled(rows) if self._files.normalize else rows).cpu()

    def _find_way(self) -> Way:
        self.try_out()
        long = proof.prompt_for(self.vocabulary, self.capacity)
        short = long[: len(long) // 4]
        alone = self._rows([long])[0]
        self.dimension = len(alone)
        if not short:
            return Way(PADDED, "", True, NothingKept())
        expected = torch.stack([self._rows([short])[0], alone])
        try:
            found = self._rows([short, long])
        except ServiceError:
            raise
        except Exception as error:  # some models take one text only; whatever they say, it runs
            said = f"several at once raise {type(error).__name__}"
            return Way(ALONE, said, False, NothingKept())
        model = self._model
        dtype = torch.float32 if model is None else model.dtype
        off = max(proof.difference(a, b) for a, b in zip(found, expected, strict=True))
        if not proof.close(off, dtype):
            said = f"embeddings beside a longer text are {off:.2g} off from those alone"
            return Way(ALONE, said, False, NothingKept())
        return Way(PADDED, "", True, NothingKept())


def _nothing() -> None:
    """To be undone before a batch is run again."""
