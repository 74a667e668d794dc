"""Any model that generates, one sequence at a time, with the cache that transformers makes for it.

For what the ragged path does not carry: encoder-decoders, recurrent state, attention of its own
making. Every sequence keeps its own cache, so they still take turns token by token.
"""

import inspect
import logging
import statistics
from typing import TYPE_CHECKING
from typing import Any
from weakref import WeakKeyDictionary

import torch

from service.engine import proof
from service.engine import scoring
from service.engine.rules import Rules
from service.engine.scheduler import Batch
from service.engine.scheduler import Memory
from service.engine.scheduler import Piece
from service.engine.slots import SlotHold
from service.engine.slots import Slots
from service.placement.inputs import PlaceInputs
from service.placement.inputs import place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from service.engine.compiling import Compiled
    from service.engine.graphs import Graphs

log = logging.getLogger(__name__)

# what architectures call the state that they return and want back
CACHES = ("past_key_values", "cache_params", "state")
# a recurrent state is computed from a whole prompt, so no step cuts one
UNCUT = 2**31
# tokens of the trial
ANSWER = 4


class Plain:
    """Runs pieces one after the other. Engine thread only."""

    name = "plain"
    together = False
    graphs: "Graphs | None" = None
    compiled: "Compiled | None" = None
    step_tokens = UNCUT

    def __init__(
        self,
        model: "PreTrainedModel",
        place_inputs: PlaceInputs,
        *,
        max_sequences: int,
        why: str,
    ) -> None:
        """why: what keeps this model from the ragged path, one clause for the operator.

        Raises LoadFailed for a model whose way of generating cannot be followed.
        """
        self.why = why
        self.memory: Memory = Slots(max_sequences, share=False)
        self._model = model
        self._place_inputs = place_inputs
        self._rules = Rules.of(model)
        # an encoder's prompt is not continued token by token, so its tokens have no logits
        self.score_tokens = 0 if model.config.is_encoder_decoder else UNCUT
        names = inspect.signature(model.forward).parameters
        # some count positions from the cache wrongly (Bamba, MiniMax), so they are told
        self._positions = "position_ids" in names and not model.config.is_encoder_decoder
        self._cached = True
        # a sequence's state goes when it gives its slot back
        self._states: WeakKeyDictionary[SlotHold, dict[str, Any]] = WeakKeyDictionary()

    @property
    def kv_bytes(self) -> dict[str, int]:
        """Nothing is reserved: every cache grows with its sequence."""
        return {}

    def logits(self, batch: Batch) -> tuple[tuple[Piece, ...], torch.Tensor]:
        """The pieces of the batch that sample, and their logits, [pieces, vocabulary]."""
        sampled = []
        for piece in batch.pieces:
            rows = self._one(piece)
            sampled.append(self._rules.applied(rows[-1], piece))
            if wanted := scoring.wanted(piece):
                # an uncached model computes more rows than the piece has
                first = wanted.start - piece.stop
                scoring.score((piece,), rows[first : first + len(wanted)])
        return batch.pieces, torch.stack(sampled)

    def undo(self) -> None:
        """Nothing: a batch is never run again, because no two sequences are in one."""

    def release(self) -> None:
        self._states.clear()

    def prove(self, prompt: tuple[int, ...]) -> None:
        """Compare the logits of a short answer, token by token, with those of `generate`.

        A model whose cache does not give them may do without: every token then costs a forward
        over the whole sequence. `why` says so, and where nothing gives them.
        """
        try:
            answer, expected = self._generated(prompt)
        except Exception:  # of some models it does not run at all; then they are their own measure
            log.warning("generate does not run for this model", exc_info=True)
            answer, expected = self._uncached(prompt)
        for cached, told in ((True, ""), (False, "without its cache, which gives other logits")):
            off: list[float] = []
            state: dict[str, Any] = {}
            for count in range(len(answer)):
                ids = (*prompt, *answer[:count])
                start = len(ids) - 1 if state else 0
                rows, state = self._forward(ids, len(prompt), start, state, cached=cached)
                off.append(proof.difference(rows[-1].float().cpu(), expected[count]))
            right = proof.close(statistics.median(off[1:] or [0.0]), self._model.dtype)
            if right:
                self._cached = cached
                self.why += f"; {told}" if told else ""
                return
        self.why += "; its logits are not those of its own `generate`"

    def _generated(self, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
        """A short greedy answer of transformers, and its logits, float32 [tokens, vocabulary]."""
        ids = torch.tensor([prompt])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found: Any = self._model.generate(
            **place(self._place_inputs, self._model, given),
            do_sample=False,
            num_beams=1,
            max_new_tokens=ANSWER,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.cat(found.logits).float().cpu()
        return found.sequences[0, -len(logits) :].tolist(), logits

    def _uncached(self, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
        """The same by a forward over everything for each token."""
        answer: list[int] = []
        rows = []
        for _ in range(ANSWER):
            found, _ = self._forward((*prompt, *answer), len(prompt), 0, {}, cached=False)
            rows.append(found[-1].float().cpu())
            answer.append(int(found[-1].argmax()))
        return answer, torch.stack(rows)

    def _one(self, piece: Piece) -> torch.Tensor:
        """Logits of its last tokens, [some, vocabulary]."""
        sequence = piece.sequence
        if not isinstance(sequence.hold, SlotHold):
            raise RuntimeError(f"sequence {sequence.id} holds no slot")
        state = self._states.get(sequence.hold, {}) if piece.start else {}
        ids = (*sequence.ids(0, piece.start), *piece.ids)
        start = piece.start if state else 0
        rows, state = self._forward(ids, len(sequence.prompt), start, state, cached=self._cached)
        self._states[sequence.hold] = state
        return rows

    def _forward(
        self, ids: tuple[int, ...], prompt: int, start: int, state: dict[str, Any], *, cached: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits of the last of `ids`, [some, vocabulary], and the state after them.

        prompt: how many of ids are the prompt. start: how many `state` covers.
        """
        if self._model.config.is_encoder_decoder:
            inputs, kept = self._decoder_inputs(ids, prompt, start, state)
        else:
            inputs, kept = {"input_ids": ids[start:]}, {}
            if self._positions:
                inputs["position_ids"] = tuple(range(start, len(ids)))
        tensors = {name: torch.tensor([values]) for name, values in inputs.items()}
        placed = place(self._place_inputs, self._model, tensors)
        output = self._model(**{**state, **kept, **placed}, use_cache=cached, return_dict=True)
        rows: torch.Tensor = output.logits[0]
        caches = {name: output[name] for name in CACHES if output.get(name) is not None}
        return rows, {**kept, **caches} if cached and caches else {}

    def _decoder_inputs(
        self, ids: tuple[int, ...], prompt: int, start: int, state: dict[str, Any]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
        """The prompt goes through the encoder once; the decoder begins with its start token."""
        if state:
            return {"decoder_input_ids": ids[start:]}, {"encoder_outputs": state["encoder_outputs"]}
        given = {"input_ids": torch.tensor([ids[:prompt]])}
        placed = place(self._place_inputs, self._model, given)
        outputs = self._model.get_encoder()(**placed, return_dict=True)
        begun = (self._rules.decoder_start, *ids[prompt:])
        return {"decoder_input_ids": begun}, {"encoder_outputs": outputs}
