"""Owns the model: finds the path its batches take, runs them, and chooses tokens.

The model is untouched: whatever transformers model it is, with whatever hooks its placement put on
it, it gets token ids and positions.
"""

import logging
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Protocol

import torch

from service.engine import choosing
from service.engine import compiling
from service.engine import proof
from service.engine import ragged
from service.engine.attention import Layer
from service.engine.attention import NotCarried
from service.engine.choosing import Chosen
from service.engine.isolating import OwnThread
from service.engine.isolating import apart
from service.engine.page_cache import Budget
from service.engine.page_cache import PageCache
from service.engine.page_cache import capturable
from service.engine.pages import Pages
from service.engine.params import SamplingParams
from service.engine.plain import ANSWER
from service.engine.plain import Plain
from service.engine.ragged import Ragged
from service.engine.rules import Rules
from service.engine.scheduler import Batch
from service.engine.scheduler import Memory
from service.engine.scheduler import Piece
from service.engine.sequence import Sequence
from service.engine.sequence import Stream
from service.engine.slot_cache import SlotCache
from service.engine.slots import Slots
from service.engine.state import State
from service.errors import LoadFailed
from service.errors import NonFiniteLogits
from service.errors import ServiceError
from service.placement import architectures
from service.placement import guard
from service.placement import kv
from service.placement.inputs import PlaceInputs

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from service.engine.compiling import Compiled
    from service.engine.graphs import Graphs

log = logging.getLogger(__name__)

# what a step gave for one piece: a token, nothing (a prompt's first pieces), or why it failed
Result = Chosen | ServiceError | None


@dataclass(frozen=True)
class Launched:
    """A step under way. pending: its tokens, where it was begun before `collect`.

    leads: the next one can be launched before this one is collected.
    """

    batch: Batch
    pending: choosing.Pending | None = None
    leads: bool = False


class Path(Protocol):
    """One way to run a batch: `Ragged` or `Plain`.

    why: what keeps the model from the fast path, or "". together: whether a batch that failed can
    be run again, after `undo`. score_tokens: most in one step of prompts whose logprobs are
    wanted; 0: none can be had. `logits` scores those as well.
    """

    name: str
    why: str
    together: bool
    memory: Memory
    step_tokens: int
    score_tokens: int
    graphs: "Graphs | None"
    compiled: "Compiled | None"

    @property
    def kv_bytes(self) -> dict[str, int]: ...
    def logits(self, batch: Batch) -> tuple[tuple[Piece, ...], torch.Tensor]: ...
    def undo(self) -> None: ...
    def release(self) -> None: ...


class Runner:
    """One model, run by one thread: the first that opens or steps it.

    vocabulary: token ids are below it. capacity: tokens of one sequence, prompt and answer
    together; `max_context`, or the model's own limit where that is lower.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        place_inputs: PlaceInputs,
        *,
        max_context: int,
        max_sequences: int = 8,
        kv_tokens: int | None = None,
        step_tokens: int | None = None,
        paged: bool = False,
        compiled: bool = False,
    ) -> None:
        """model: in eval mode, placed and proven. Raises LoadFailed if it cannot generate.

        kv_tokens: tokens of keys and values kept in all; None: max_context x max_sequences.
        step_tokens: most in one step; None: what suits the device. paged: keep pages on a CPU too,
        as on CUDA; slower there. compiled: run what torch.compile makes of the model.
        """
        if not model.can_generate():
            raise LoadFailed(
                f"{type(model).__name__} is not a language model",
                hint="return the model with its head from `load`, such as AutoModelForCausalLM's",
            )
        config = model.config.get_text_config(decoder=True)
        limit = architectures.context_limit(model.config)
        self.vocabulary: int = config.vocab_size
        # Beyond its limit a model with learned positions reads outside its table, which on CUDA
        # ends the process.
        self.capacity = min(max_context, limit or max_context)
        self.max_sequences = max_sequences
        self._kv_tokens = kv_tokens or self.capacity * max_sequences
        self._step_tokens = step_tokens
        self._paged = paged
        self._compiled = compiled
        self._model: PreTrainedModel | None = model
        self._place_inputs = place_inputs
        self._path: Path | None = None
        self._thread = OwnThread()

    @property
    def path(self) -> Path:
        """How batches are run. Raises RuntimeError before `open` and after `release`."""
        if self._path is None:
            raise RuntimeError("this runner is not open")
        return self._path

    @property
    def way(self) -> Path | None:
        """The path, or None before `open` and after `release`. Any thread."""
        return self._path

    def open(self) -> None:
        """Find the path, reserve the cache, and generate a token through the way of every request.

        Raises PluginError or LoadFailed, naming what is wrong, so that nothing is served that
        cannot run.
        """
        self._thread.claim()
        try:
            with torch.inference_mode():
                self._path = self._find_path()
            if self._path.why:
                log.warning("the plain engine path is used: %s", self._path.why)
            self.try_out()
        except ServiceError:
            raise
        except Exception as error:  # the model may raise anything; at start it all means the same
            raise LoadFailed(
                f"The first token could not be generated: {type(error).__name__}: {error}"
            ) from error

    def try_out(self) -> None:
        """Generate two tokens and read them back. Raises LoadFailed or PluginError."""
        self._thread.claim()
        memory = self.path.memory
        params = SamplingParams(max_tokens=min(2, self.capacity), temperature=0.0)
        sequence = Sequence(-1, (0,), params, Stream(1), choice=State(params))
        if not memory.admit(sequence):
            return  # sequences are running: they are the trial
        try:
            ids = (0,)
            for start in range(params.max_tokens):
                memory.grow(sequence, start + 1)
                piece = Piece(sequence, ids, start, samples=True)
                batch = Batch((piece,), ()) if start else Batch((), (piece,))
                result = self._run(batch)[0][1]
                if isinstance(result, ServiceError):
                    raise result
                if result is not None:
                    ids = (result.token,)
                sequence.computed = start + 1
        except NonFiniteLogits as error:
            raise LoadFailed(f"The first token could not be generated: {error.message}") from error
        finally:
            memory.free(sequence, failed=True)

    def launch(self, batch: Batch) -> Launched:
        """Begin a step; `collect` finishes it. Engine thread only.

        A batch that follows may be launched before the one it follows has been collected.
        """
        self._thread.claim()
        graphs = self.path.graphs
        if graphs is None or batch.prefills or len(batch.decodes) > graphs.most:
            return Launched(batch)
        try:
            states = [_state(piece.sequence) for piece in batch.decodes]
            with guard.stillness.step(), torch.inference_mode():
                replayed = graphs.replay(batch)
                pending = choosing.launch(replayed.logits, states, replayed.likeliest)
        except Exception:  # `collect` runs the batch again and finds whose fault it is
            log.warning("a captured step could not be launched", exc_info=True)
            return Launched(batch)
        return Launched(batch, pending, choosing.greedy_only(states))

    def collect(self, launched: Launched) -> list[tuple[Piece, Result]]:
        """Finish a step: what it gave for every piece. Engine thread only.

        Never raises for what one sequence did: a batch that fails is run again in halves until the
        guilty one is found, and only that fails.
        """
        self._thread.claim()
        batch = launched.batch
        if launched.pending is not None:
            try:
                return list(zip(batch.decodes, launched.pending.collect(), strict=True))
            except Exception:  # whatever a device may raise; the batch is run again
                log.warning("a captured step failed", exc_info=True)
        known = _known(batch)
        if not known.pieces:
            return []
        return apart(known, self._run, together=self.path.together, undo=self.path.undo)

    def release(self) -> None:
        """Let go of the model and of its cache: nothing is run after this. Engine thread."""
        path, self._path = self._path, None
        self._model = None
        if path is not None:
            path.release()

    def _run(self, batch: Batch) -> list[tuple[Piece, Result]]:
        with guard.stillness.step(), torch.inference_mode():
            sampling, logits = self.path.logits(batch)
            states = [_state(piece.sequence) for piece in sampling]
            chosen: List[Result] = choosing.choose(logits, states) if states else []
        found: dict[Piece, Result] = dict(zip(sampling, chosen, strict=True))
        return [(piece, found.get(piece)) for piece in batch.pieces]

    def _find_path(self) -> Path:
        model = self._model
        if model is None:
            raise RuntimeError("the model of this runner was released")
        try:
            return self._ragged(model)
        except NotCarried as reason:
            if self._compiled:
                raise compiling.refused(str(reason)) from None
            plain = Plain(
                model,
                self._place_inputs,
                max_sequences=self.max_sequences,
                why=str(reason),
            )
            if self.capacity > ANSWER:
                plain.prove(proof.prompt_for(self.vocabulary, self.capacity - ANSWER))
            return plain

    def _ragged(self, model: "PreTrainedModel") -> Path:
        """The fast path, proven. Raises NotCarried."""
        if why := architectures.plain_path(model.config):
            raise NotCarried(why)
        if model._is_stateful or not model._supports_default_dynamic_cache():
            raise NotCarried("it has a recurrent state")
        if Rules.of(model).constrain:
            raise NotCarried("its generation_config.json forbids tokens")
        ids = proof.prompt_for(self.vocabulary, self.capacity)
        expected = proof.own_logits(model, self._place_inputs, ids)
        layers = ragged.layers_of(model, self._place_inputs)
        on_cuda = any(layer.device.type == "cuda" for layer in layers.values())
        step_tokens = self._step_tokens or kv.STEP_TOKENS["cuda" if on_cuda else "cpu"]
        make = self._pages if on_cuda or self._paged else self._slots
        memory, cache = make(layers, step_tokens)
        path = Ragged(model, self._place_inputs, memory, cache, step_tokens=step_tokens)
        dtype = next(iter(layers.values())).dtype

        def prove() -> None:
            proof.prove(path, ids, expected, dtype)

        try:
            prove()
            if self._compiled:
                compiling.bring(path, model, prove)
        except BaseException:
            path.release()
            raise
        if isinstance(cache, PageCache) and (device := capturable(model, cache)):
            self._capture(path, model, cache, device, prove)
        return path

    def _capture(
        self,
        path: Ragged,
        model: "PreTrainedModel",
        cache: PageCache,
        device: torch.device,
        prove: "Callable[[], None]",
    ) -> None:
        """Have the path run CUDA graphs, if the model can be captured and `prove` finds them to
        give its own logits.
        """
        from service.engine.graphs import Graphs
        from service.engine.segments import Segments

        run = path.compiled or model
        try:
            graphs = Graphs(model, self._place_inputs, cache, device, self.max_sequences, run)
            most = min(path.step_tokens, self.capacity * self.max_sequences)
            path.segments = Segments(run, cache, graphs.room, most=most)
            prove()
        except Exception as error:  # whatever a model does that a graph cannot hold
            path.segments = None
            why = str(error).partition("\n")[0]  # CUDA's go on with advice for its own developers
            log.warning("steps are not captured: %s: %s", type(error).__name__, why)
            return
        path.graphs = graphs

    def _slots(
        self, layers: "Mapping[int, Layer]", step_tokens: int
    ) -> tuple[Memory, ragged.Cache]:
        count = kv.running(self._kv_tokens, self.capacity, self.max_sequences, on_cuda=False)
        cache = SlotCache(layers, count, self.capacity)
        share = set(cache.lengths.values()) == {self.capacity}
        return Slots(count, share=share), cache

    def _pages(
        self, layers: "Mapping[int, Layer]", step_tokens: int
    ) -> tuple[Memory, ragged.Cache]:
        budget = Budget(self._kv_tokens, self.capacity, self.max_sequences, step_tokens)
        cache = PageCache(layers, budget)
        return Pages(cache.groups), cache


def _state(sequence: Sequence) -> State:
    if sequence.choice is None:
        sequence.choice = State(sequence.params, sequence.prompt, sequence.number)
    return sequence.choice


def _known(batch: Batch) -> Batch:
    """The batch with its tokens, which are known once the step before has been recorded."""
    if not batch.follows:
        return batch
    return Batch(
        tuple(
            Piece(its.sequence, its.sequence.ids(its.start, its.stop), its.start, its.samples)
            for its in batch.decodes
            if its.sequence.known >= its.stop
        )
    )
