"""Owns the model and every sequence's KV cache; inputs are placed once a step.

A step is one forward of one sequence. The model is untouched: whatever transformers decoder it is,
with whatever hooks its placement put on it, it gets token ids and a cache.
"""

import inspect
import threading
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from service.engine.sampling import check_finite
from service.errors import LoadFailed
from service.errors import NonFiniteLogits
from service.errors import ServiceError
from service.placement.inputs import PlaceInputs
from service.placement.inputs import place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP_ID = -1  # the engine counts from 0


@dataclass
class _Cache:
    layers: DynamicCache
    tokens: int = 0


class Runner:
    """One model, run by one thread: the first that runs a step, for as long as the runner lives.

    vocabulary: token ids are below it. capacity: tokens of one sequence, prompt and answer
    together; `max_context`, or the model's own limit where that is lower. kv_tokens: tokens now
    held in KV caches (any thread may read it).
    """

    def __init__(
        self, model: "PreTrainedModel", place_inputs: PlaceInputs, *, max_context: int
    ) -> None:
        """model: a decoder in eval mode, placed and proven. Raises LoadFailed for another kind."""
        _refuse_unless_decoder(model)
        config = model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        self.vocabulary: int = config.vocab_size
        # Beyond its limit a model with learned positions reads outside its table, which on CUDA
        # ends the process.
        self.capacity = min(max_context, limit) if isinstance(limit, int) else max_context
        self.kv_tokens = 0
        self._model: PreTrainedModel | None = model
        self._place_inputs = place_inputs
        self._caches: dict[int, _Cache] = {}
        self._thread: threading.Thread | None = None
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def step(self, sequence_id: int, ids: Ids[int], start: int) -> torch.Tensor:
        """Show the model `ids`, the tokens of a sequence from `start` on; return the last's logits.

        Returns float32 [vocabulary] on the CPU. The cache of a sequence begins with its first step
        and lasts until `free`. After a step that raised, free the sequence: its cache may be half
        written. Raises PluginError if `place_inputs` breaks its contract, RuntimeError if called
        from a second thread or out of order, and whatever the model's forward raises.
        """
        self._claim_thread()
        model = self._model
        if model is None:
            raise RuntimeError("the model of this runner was released")
        cache = self._caches.get(sequence_id)
        if cache is None:
            cache = self._caches[sequence_id] = _Cache(DynamicCache(config=model.config))
        if cache.tokens != start:
            raise RuntimeError(
                f"sequence {sequence_id}: step at {start}, but its cache has {cache.tokens} tokens"
            )
        with torch.inference_mode():
            inputs = {"input_ids": torch.tensor([ids], dtype=torch.int64)}
            output = model(
                **place(self._place_inputs, model, inputs),
                past_key_values=cache.layers,
                use_cache=True,
                return_dict=True,
                **self._last_only,
            )
            logits: torch.Tensor = output.logits[0, -1].float().cpu()
        cache.tokens += len(ids)
        self.kv_tokens += len(ids)
        return logits

    def free(self, sequence_id: int) -> None:
        """Drop the KV cache of a sequence; does nothing if it has none. Same thread as `step`."""
        self._claim_thread()
        cache = self._caches.pop(sequence_id, None)
        if cache is not None:
            self.kv_tokens -= cache.tokens

    def release(self) -> None:
        """Let go of the model and of every KV cache: nothing is run after this. Engine thread."""
        self._model = None
        self._caches.clear()
        self.kv_tokens = 0

    def warm_up(self) -> None:
        """Generate one token and read it back, through the same path as every request.

        Raises PluginError or LoadFailed, naming what is wrong, so that nothing is served that
        cannot run.
        """
        try:
            logits = self.step(_WARM_UP_ID, [0], 0)
            check_finite(logits)
            token = min(int(logits.argmax()), self.vocabulary - 1)
            if self.capacity > 1:
                check_finite(self.step(_WARM_UP_ID, [token], 1))
        except NonFiniteLogits as error:
            raise LoadFailed(f"The first token could not be generated: {error.message}") from error
        except ServiceError:
            raise
        except Exception as error:  # the model may raise anything; at start it all means the same
            raise LoadFailed(
                f"The first token could not be generated: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.free(_WARM_UP_ID)

    def _claim_thread(self) -> None:
        """F6: with offload hooks a second thread would read weights that the first is moving."""
        current = threading.current_thread()
        if self._thread is None:
            self._thread = current
        elif self._thread is not current:
            raise RuntimeError(
                f"thread {current.name} tried to run the model of thread {self._thread.name} (F6)"
            )


def _refuse_unless_decoder(model: "PreTrainedModel") -> None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif not model.can_generate():
        kind = "not a language model"
    elif model._is_stateful or not model._supports_default_dynamic_cache():
        kind = "a model with recurrent state"  # its prompt cannot be computed in chunks
    else:
        return
    raise LoadFailed(
        f"{name} is {kind}; only decoder-only attention models can be served.",
        hint="Choose a causal language model, such as a Llama, Qwen, Gemma, Mistral or Phi.",
    )
