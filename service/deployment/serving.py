"""A proven model gets an engine, which generates one token through the real path."""

import time
from collections.abc import Callable
from collections.abc import Container
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any

from service.deployment.uses import Uses
from service.errors import LoadFailed
from service.models import sentence_files
from service.text.constraints import prepare
from service.text.tokenizer import load_tokenizer
from service.text.tokenizer import sampling_defaults
from service.text.tokenizer import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from service.engine.embedding import EmbeddingRunner
    from service.engine.engine import Engine
    from service.engine.runner import Runner
    from service.models.sentence_files import SentenceFiles
    from service.placement.loading import Loaded


@dataclass(frozen=True)
class Embeddings:
    """What the embeddings of a model are, and what becomes of a text before its tokens.

    dimension: numbers in one. shorter: how many of the first it was trained to be cut to. scaled:
    whether they have length 1. prompt, lower: see `SentenceFiles`. at_once: texts of one step.
    """

    dimension: int
    at_once: int
    shorter: Container[int] = ()
    scaled: bool = True
    prompt: str = ""
    lower: bool = False


@dataclass(frozen=True)
class Serving:
    """A proven model that answers, and what a request needs to know of it.

    created: Unix seconds. stop_ids: tokens that end an answer. max_context: tokens of prompt and
    answer. defaults: sampling settings the model's publisher recommends, where a request gives
    none. vocabulary: logits of the model. uses: requests that are at work with it. embeddings: what
    it gives instead of text; None for a model that generates.
    """

    model_id: str
    created: int
    engine: "Engine"
    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: frozenset[int]
    max_context: int
    defaults: dict[str, float] = field(default_factory=dict)
    vocabulary: int = 0
    uses: Uses = field(default_factory=Uses)
    embeddings: Embeddings | None = None


def serve(
    loaded: "Loaded", *, max_queue: int, on_death: Callable[[BaseException], None]
) -> Serving:
    """Start the engine. max_queue, on_death: see `Engine`. Raises what its start raises; then its
    thread has ended.
    """
    from service.engine.engine import Engine
    from service.placement import architectures
    from service.placement.loading import collect

    config, model = loaded.config, loaded.model
    tokenizer = load_tokenizer(config)
    collect()  # what loading and proving left in the accelerator's caches is the KV pages' room
    if architectures.embeds(model.config, config):
        if config.compile:
            raise LoadFailed(
                "compile: true is for models that generate; this one gives embeddings",
                hint="set compile: false",
            )
        files = sentence_files.read(config.folder)
        embedding = _embedding_runner(loaded, files)
        engine = Engine(embedding, max_queue=max_queue, on_death=on_death)
        _start(engine)
        return Serving(
            config.model_id,
            int(time.time()),
            engine,
            tokenizer,
            frozenset(),
            embedding.capacity,
            vocabulary=embedding.vocabulary,
            embeddings=_embeddings(model.config, embedding, files),
        )
    runner = _runner(loaded)
    stops = stop_ids(model, tokenizer)
    prepare(tokenizer, runner.vocabulary, stops)
    engine = Engine(runner, max_queue=max_queue, on_death=on_death)
    _start(engine)
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


def _start(engine: "Engine") -> None:
    try:
        engine.start()
    except BaseException:
        engine.close()
        raise


def _runner(loaded: "Loaded") -> "Runner":
    from service.engine.runner import Runner

    config = loaded.config
    return Runner(
        loaded.model,
        loaded.strategy.place_inputs,
        max_context=loaded.placement.context or config.max_context,
        max_sequences=config.max_sequences,
        kv_tokens=config.kv_tokens,
        compiled=config.compile,
    )


def _embedding_runner(loaded: "Loaded", files: "SentenceFiles") -> "EmbeddingRunner":
    from service.engine.embedding import EmbeddingRunner

    config = loaded.config
    return EmbeddingRunner(
        loaded.model,
        loaded.strategy.place_inputs,
        files,
        max_context=loaded.placement.context or config.max_context,
        max_sequences=config.max_sequences,
    )


def _embeddings(hf_config: Any, runner: "EmbeddingRunner", files: "SentenceFiles") -> Embeddings:
    """What config.json says of shorter ones: a list, or that any length will do."""
    shorter: Container[int] = ()
    listed = getattr(hf_config, "matryoshka_dimensions", None)
    if isinstance(listed, list | tuple):
        shorter = tuple(number for number in listed if type(number) is int and number > 0)
    elif getattr(hf_config, "is_matryoshka", None) is True:
        shorter = range(1, runner.dimension)
    return Embeddings(
        runner.dimension,
        runner.max_sequences,
        shorter,
        files.normalize,
        files.prompt,
        files.lower,
    )
