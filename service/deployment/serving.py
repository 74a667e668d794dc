"""A proven model gets an engine, which generates one token through the real path."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING

from service.text.constraints import prepare
from service.text.tokenizer import load_tokenizer
from service.text.tokenizer import sampling_defaults
from service.text.tokenizer import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from service.engine.engine import Engine
    from service.placement.loading import Loaded


@dataclass(frozen=True)
class Serving:
    """A proven model that answers, and what a request needs to know of it.

    created: Unix seconds. stop_ids: tokens that end an answer. max_context: tokens of prompt and
    answer. defaults: sampling settings the model's publisher recommends, where a request gives
    none. vocabulary: logits of the model.
    """

    model_id: str
    created: int
    engine: "Engine"
    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: frozenset[int]
    max_context: int
    defaults: dict[str, float] = field(default_factory=dict)
    vocabulary: int = 0


def serve(
    loaded: "Loaded", *, max_queue: int, on_death: Callable[[BaseException], None]
) -> Serving:
    """Start the engine. max_queue, on_death: see `Engine`. Raises what its start raises; then its
    thread has ended.
    """
    from service.engine.engine import Engine
    from service.engine.runner import Runner
    from service.placement.loading import collect

    config, model = loaded.config, loaded.model
    tokenizer = load_tokenizer(config)
    collect()  # what loading and proving left in the accelerator's caches is the KV pages' room
    context = loaded.placement.context or config.max_context
    runner = Runner(
        model,
        loaded.strategy.place_inputs,
        max_context=context,
        max_sequences=config.max_sequences,
        kv_tokens=config.kv_tokens,
    )
    stops = stop_ids(model, tokenizer)
    prepare(tokenizer, runner.vocabulary, stops)
    engine = Engine(runner, max_queue=max_queue, on_death=on_death)
    try:
        engine.start()
    except BaseException:
        engine.close()
        raise
    return Serving(
        config.model_id,
        int(time.time()),
        engine,
        tokenizer,
        stops,
        runner.capacity,
        sampling_defaults(model),
        runner.vocabulary,
    )
