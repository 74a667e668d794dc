"""POST /v1/embeddings: texts in, one row of numbers for each."""

import base64
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from flask import Flask
from flask import Response
from flask import g
from flask import jsonify
from flask import request

from service.deployment import Deployment
from service.deployment import Serving
from service.engine.params import SamplingParams
from service.engine.sequence import Stream
from service.errors import ClientGone
from service.errors import ContextTooLong
from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.errors import InvalidRequest
from service.errors import Overloaded
from service.errors import UnsupportedParameter
from service.text import tokenizing
from service.web import answers
from service.web import generation
from service.web import routes
from service.web.access import Record
from service.web.admission import Slot
from service.web.admission import Slots
from service.web.admission import client_gone
from service.web.body import read_json
from service.web.embeddings_schema import EMBEDDING
from service.web.embeddings_schema import EmbeddingRequest
from service.web.embeddings_schema import embedding_request
from service.web.routes import Operation

if TYPE_CHECKING:
    from service.deployment.serving import Embeddings

POOLED = SamplingParams(max_tokens=0, pooled=True)

OPERATION = Operation(
    "Texts in, an embedding of each out",
    answers.EmbeddingList,
    EMBEDDING,
    errors=routes.OF_ANSWER,
    examples={
        "a text": {"input": "The sea is calm tonight."},
        "two texts, packed": {"input": ["One", "Two"], "encoding_format": "base64"},
        "token ids": {"input": [[1, 2, 3], [4, 5]]},
    },
    said="For a model that gives embeddings: `capabilities` in /v1/models says so.",
)


@dataclass(frozen=True)
class Work:
    """Checked inputs as token ids, on their way to the engine."""

    serving: Serving
    inputs: Sequence[tuple[int, ...]]
    gives: "Embeddings"
    deadline: float
    environ: Mapping[str, Any]
    record: Record
    slot: Slot


def add_routes(app: Flask, deployment: Deployment, slots: Slots) -> None:
    def embeddings() -> Response:
        # Before reading: a body that comes slowly keeps a thread as well.
        slot = slots.take(g.record.key)
        try:
            serving = slot.use(deployment, g.deadline)
            server = deployment.config.server
            asked, ignored = embedding_request(read_json(request.environ, server.max_body))
            generation.note_ignored(ignored, server.unknown_fields)
            generation.check_model(asked.model, serving)
            gives = _gives(serving)
            _check_dimensions(asked.dimensions, gives)
            work = Work(
                serving,
                _inputs(asked, serving, gives),
                gives,
                g.deadline,
                request.environ,
                g.record,
                slot,
            )
            return jsonify(_answer(work, asked))
        finally:
            slot.release()

    routes.add(app, "/v1/embeddings", embeddings, OPERATION)


def _gives(serving: Serving) -> "Embeddings":
    if serving.embeddings is None:
        raise InvalidRequest(
            f"{serving.model_id} generates text; it gives no embeddings",
            param="model",
            hint="serve a model that does, for example model: all-minilm-l6-v2",
        )
    return serving.embeddings


def _check_dimensions(dimensions: int | None, gives: "Embeddings") -> None:
    """Raise for what the model cannot give, or was not trained to be cut to."""
    if dimensions is None or dimensions == gives.dimension or dimensions in gives.shorter:
        return
    if dimensions > gives.dimension:
        raise InvalidRequest(
            f"dimensions is {dimensions}; this model's embeddings have {gives.dimension}",
            param="dimensions",
        )
    raise UnsupportedParameter(
        f"dimensions is {dimensions}; nothing says that this model's embeddings of "
        f"{gives.dimension} may be cut to that",
        param="dimensions",
        hint='leave it out; for a model that was trained for it (Matryoshka) set "is_matryoshka": '
        'true or "matryoshka_dimensions" in its config.json',
    )


def _inputs(
    asked: EmbeddingRequest, serving: Serving, gives: "Embeddings"
) -> tuple[tuple[int, ...], ...]:
    """Token ids of every input. Raises ContextTooLong, InvalidRequest."""
    several = len(asked.inputs) > 1
    found = []
    for at, given in enumerate(asked.inputs):
        where = f"input[{at}]" if several else "input"
        if isinstance(given, str):
            text = gives.prompt + given
            text = text.lower() if gives.lower else text
            ids = tuple(tokenizing.token_ids(serving.tokenizer, text, special=True))
        else:
            ids = given
            _check_ids(where, ids, serving.vocabulary)
        if not ids:
            raise InvalidRequest(f"{where} has no tokens", param=where)
        if len(ids) > serving.max_context:
            raise ContextTooLong(
                f"This model's maximum context length is {serving.max_context} tokens. However,"
                f" {where} has {len(ids)} tokens. Send less text.",
                param=where,
            )
        found.append(ids)
    return tuple(found)


def _check_ids(where: str, ids: Sequence[int], vocabulary: int) -> None:
    for token in ids:
        if not 0 <= token < vocabulary:
            raise InvalidRequest(
                f"{where} has token {token}; this model's ids are 0 to {vocabulary - 1}",
                param=where,
            )


def _answer(work: Work, asked: EmbeddingRequest) -> dict[str, Any]:
    packed = asked.encoding_format == "base64"
    data: list[dict[str, Any]] = [{} for _ in work.inputs]
    for index, row in _rows(work):
        if asked.dimensions not in (None, work.gives.dimension):
            row = _cut(row, asked.dimensions, scaled=work.gives.scaled)
        written = base64.b64encode(row.tobytes()).decode() if packed else row.tolist()
        data[index] = {"object": "embedding", "index": index, "embedding": written}
    tokens = sum(map(len, work.inputs))
    return {
        "object": "list",
        "data": data,
        "model": work.serving.model_id,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _cut(row: "np.ndarray", dimensions: int | None, *, scaled: bool) -> "np.ndarray":
    """The first numbers of an embedding, of length 1 again if it was."""
    cut = row[:dimensions]
    length = float(np.linalg.norm(cut)) if scaled else 1.0
    return cut if length in (0.0, 1.0) else (cut / length).astype("<f4")


def _rows(work: Work) -> "Iterator[tuple[int, np.ndarray]]":
    """Embeddings with the index of their input, as they come: short inputs first.

    Of many inputs, those of two steps are in the engine at a time: one runs, the next waits, so
    that a long list neither fills the queue nor keeps others waiting. Cancels everything if not
    read to the end. Raises Overloaded while nothing is in the engine, ClientGone when the client
    has left, DeadlineExceeded (by itself when a step hangs beyond it), or the error of an input.
    """
    order = sorted(range(len(work.inputs)), key=lambda index: len(work.inputs[index]))
    step = work.gives.at_once
    waiting = deque(order[start : start + step] for start in range(0, len(order), step))
    running: deque[tuple[int, Stream]] = deque()
    begun = False
    try:
        while waiting or running:
            while waiting and len(running) <= step:
                streams = _submit(work, waiting[0], begun=begun)
                if streams is None:
                    break
                if not begun:
                    _charge(work)
                begun = True
                running.extend(zip(waiting.popleft(), streams, strict=True))
            if client_gone(work.environ):
                raise ClientGone("the client closed the connection")
            if time.monotonic() >= work.deadline + generation.HUNG_S:
                raise DeadlineExceeded("The request took longer than it was given.")
            if not running:  # others have filled the queue meanwhile
                _pause(work.deadline)
                continue
            index, stream = running[0]
            try:
                stream.read(generation.TICK_S)
            except TimeoutError:
                continue
            running.popleft()
            yield index, _row(stream)
    except BaseException as error:
        work.record.failed(error)
        for _, stream in running:
            stream.cancel()
        raise


def _submit(work: Work, chosen: Sequence[int], *, begun: bool) -> list[Stream] | None:
    """Streams of these inputs; None if there is no room now, but was for others of the request."""
    prompts = [(work.inputs[index], POOLED) for index in chosen]
    try:
        return work.serving.engine.submit_all(prompts, work.deadline, owner=work.record.key)
    except Overloaded:
        if not begun:
            raise
        return None


def _charge(work: Work) -> None:
    """All of the request's tokens at once: they have been computed, or will be."""
    tokens = sum(map(len, work.inputs))
    work.record.submitted(work.serving.model_id, tokens, ())
    work.slot.follow(tokens, ())


def _pause(deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("The request took longer than it was given.")
    time.sleep(min(left, generation.TICK_S))


def _row(stream: Stream) -> "np.ndarray":
    if stream.embedding is None:  # somebody else has cancelled it
        raise EngineStopped("The input was dropped before it was computed.")
    return np.frombuffer(stream.embedding, "<f4")
