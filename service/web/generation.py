"""The way of every request for text: a slot, a body, prompts into the engine, answers out."""

import logging
import time
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any
from typing import Protocol

from flask import Response
from flask import g
from flask import jsonify
from flask import request

from service.deployment import Deployment
from service.deployment import Serving
from service.engine.params import Constraint
from service.engine.params import SamplingParams
from service.engine.sequence import Stream
from service.errors import ClientGone
from service.errors import ContextTooLong
from service.errors import InvalidRequest
from service.errors import UnknownModel
from service.text.answer import Reading
from service.text.stream import Piece
from service.text.stream import pieces
from service.web import sse
from service.web.access import Record
from service.web.admission import Slots
from service.web.admission import client_gone
from service.web.body import read_json
from service.web.body import short
from service.web.fields import refuse_unknown
from service.web.schemas import ChatRequest
from service.web.schemas import CompletionRequest

if TYPE_CHECKING:
    from service.engine.choosing import Chosen

LOG = logging.getLogger(__name__)
TICK_S = 0.25
# logprobs that one request may ask for: some 100 bytes each until its answer is written
MAX_TOLD = 2**22

TextRequest = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class Job:
    """A checked request with its prompts as token ids. `param` names them in errors.

    echo: the text of every prompt, if answers begin with it. prompt_logprobs: as the engine takes
    it. constraint: makes what each answer must follow; one is made for every choice. reading: how
    answers are taken apart; None if they are plain text.
    """

    request: TextRequest
    prompts: tuple[tuple[int, ...], ...]
    param: str
    echo: tuple[str, ...] = ()
    prompt_logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None
    reading: Reading | None = None


@dataclass(frozen=True)
class Part:
    """What comes next of one choice, or all of it.

    tokens: with their logprobs, if those were asked for. finish_reason: of the last part.
    """

    text: str
    tokens: tuple["Chosen", ...] = ()
    finish_reason: str | None = None


class Shape(Protocol):
    """How answers are written in JSON: the difference between the two endpoints.

    One for each request. It is told of every part of every choice in order.
    """

    prefix: str
    object: str
    chunk_object: str

    def choice(self, index: int, answer: Part) -> dict[str, Any]:
        """A whole answer."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream starts with, before there is text."""

    def delta(self, index: int, part: Part) -> dict[str, Any]:
        """A part of an answer, or its end."""


@dataclass(frozen=True)
class Work:
    """A job that is in the engine. streams: `n` for each prompt, in the order of choices."""

    job: Job
    serving: Serving
    streams: tuple[Stream, ...]
    environ: Mapping[str, Any]
    record: Record

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()


def answer(
    deployment: Deployment,
    slots: Slots,
    read: Callable[[Mapping[str, Any], Serving], Job],
    make_shape: Callable[[Work], Shape],
) -> Response:
    """Answer the current request.

    read: turns the JSON body into a Job. The sequences are submitted before a streaming response
    is built, so that a full queue is a real 429 and a prompt that is too long a real 400.
    """
    serving = deployment.serving()
    config = deployment.config
    # Before reading: a body that comes slowly keeps a thread as well.
    slot = slots.take(g.record.key)
    try:
        body = read_json(request.environ, config.server.max_body)
        job = read(body, serving)
        most = config.deployment.max_sequences + config.server.max_queue
        n = job.request.n
        if len(job.prompts) * n > most:
            asked = f"{job.param} has {len(job.prompts)} prompts"
            asked += f" with {n} answers each" if n > 1 else ""
            raise InvalidRequest(
                f"{asked}; this server takes {most} at once", param="n" if n > 1 else job.param
            )
        work = _submit(job, serving, g.deadline, request.environ)
        slot.follow(work.record.prompt_tokens or 0, work.streams)
        shape = make_shape(work)
        if job.request.stream:
            response = sse.response(sse.stream(_events(work, shape), g.request_id))
            response.call_on_close(work.cancel)
            response.call_on_close(slot.release)
            return response
        result = jsonify(_whole(work, shape))
    except BaseException:
        slot.release()
        raise
    slot.release()
    return result


def check_model(name: str, serving: Serving) -> None:
    """Names are compared, never joined to a path. Raises UnknownModel naming what is served."""
    if name != serving.model_id:
        raise UnknownModel(
            f"the model {short(name)} does not exist here; this server serves {serving.model_id}",
            param="model",
        )


def note_ignored(names: Sequence[str], unknown_fields: str) -> None:
    """Names nobody specifies: refused if so configured, else in a header and the log."""
    if unknown_fields == "refuse":
        refuse_unknown(list(names))
    if names:
        g.ignored = list(names)
        LOG.info("request %s: ignored %s", g.request_id, ", ".join(map(short, names[:20])))


def _submit(job: Job, serving: Serving, deadline: float, environ: Mapping[str, Any]) -> Work:
    prompts = [
        (ids, _sampling(job, serving, len(ids)))
        for ids in job.prompts
        for _ in range(job.request.n)
    ]
    _check_told(prompts)
    record: Record = g.record
    streams = serving.engine.submit_all(prompts, deadline, owner=record.key)
    # A prompt that occurs again is computed once.
    record.submitted(sum(map(len, set(job.prompts))), len(streams))
    return Work(job, serving, tuple(streams), environ, record)


def _check_told(prompts: Sequence[tuple[Sequence[int], SamplingParams]]) -> None:
    """Raise InvalidRequest for more logprobs than one request may make this server remember."""
    told = 0
    for ids, params in prompts:
        if params.logprobs is not None:
            told += params.max_tokens * (1 + params.logprobs)
        if params.prompt_logprobs is not None:
            told += len(ids) * (1 + params.prompt_logprobs)
    if told > MAX_TOLD:
        raise InvalidRequest(
            f"the answers may have {told} logprobs in all; {MAX_TOLD} are allowed",
            param="logprobs",
            hint="ask for fewer answers, fewer tokens, or fewer of the likeliest",
        )


def _sampling(job: Job, serving: Serving, prompt_tokens: int) -> SamplingParams:
    """Parameters for a prompt of that many tokens. Raises InvalidRequest, ContextTooLong."""
    wanted = job.request
    if prompt_tokens == 0:
        raise InvalidRequest(f"{job.param} is empty", param=job.param)
    left = serving.max_context - prompt_tokens
    limit = left if wanted.limit is None else wanted.limit
    if limit > left or (wanted.limit is None and left < 1):
        asked = f" and you asked for {limit} more" if wanted.limit is not None else ""
        raise ContextTooLong(
            f"This model's maximum context length is {serving.max_context} tokens. However,"
            f" {job.param} has {prompt_tokens} tokens{asked}."
            " Send less text or ask for fewer tokens.",
            param=job.param,
        )
    own_stops = frozenset() if wanted.ignore_eos else serving.stop_ids
    return SamplingParams(
        max_tokens=limit,
        temperature=_first(wanted.temperature, serving.defaults.get("temperature"), 1.0),
        top_k=max(0, int(_first(wanted.top_k, serving.defaults.get("top_k"), 0))),
        top_p=_first(wanted.top_p, serving.defaults.get("top_p"), 1.0),
        min_p=_first(wanted.min_p, serving.defaults.get("min_p"), 0.0),
        repetition_penalty=_first(
            wanted.repetition_penalty, serving.defaults.get("repetition_penalty"), 1.0
        ),
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=wanted.logit_bias,
        seed=wanted.seed,
        stop_ids=own_stops | set(wanted.stop_token_ids),
        min_tokens=wanted.min_tokens,
        logprobs=wanted.reported,
        prompt_logprobs=job.prompt_logprobs,
        constraint=None if job.constraint is None else job.constraint(),
    )


def _first(asked: float | None, recommended: float | None, otherwise: float) -> float:
    """What the request asks for, else the model's files, else OpenAI's default."""
    if asked is not None:
        return float(asked)
    return float(otherwise if recommended is None else recommended)


def _arriving(work: Work) -> Iterator[tuple[int, Piece]]:
    """Pieces of all answers as they come, with their index.

    Cancels everything if not read to the end. Raises ClientGone when the client has left (looked
    at every TICK_S, also while queued), or the error of a sequence.
    """
    stop = work.job.request.stop
    control = work.job.reading is not None
    # Several streams are asked in turn, so none may keep the others waiting for long.
    tick_s = TICK_S if len(work.streams) == 1 else TICK_S / 5 / len(work.streams)
    running = {
        index: pieces(work.serving.tokenizer, stream, stop, tick_s, control=control)
        for index, stream in enumerate(work.streams)
    }
    looked = time.monotonic()
    try:
        while running:
            for index in list(running):
                piece = next(running[index])
                work.record.saw(index, piece)
                if time.monotonic() - looked >= TICK_S:
                    looked = time.monotonic()
                    if client_gone(work.environ):
                        raise ClientGone("the client closed the connection")
                if piece.finish_reason is not None:
                    del running[index]
                yield index, piece
    except BaseException as error:
        work.record.failed(error)
        work.cancel()
        raise


def _parts(work: Work) -> Iterator[tuple[int, Piece, tuple["Chosen", ...]]]:
    """Pieces as they come, with their index and the tokens that have logprobs to tell.

    Tokens wait for a piece that is shown: text of several of them may come with the last only.
    """
    told = [0 for _ in work.streams]
    wanted = work.job.request.reported is not None
    for index, piece in _arriving(work):
        tokens: tuple[Chosen, ...] = ()
        if wanted and (piece.text or piece.finish_reason is not None):
            tokens = tuple(work.streams[index].logprobs[told[index] : piece.completion_tokens])
            told[index] = piece.completion_tokens
        yield index, piece, tokens


def _whole(work: Work, shape: Shape) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in work.streams]
    tokens: list[list[Chosen]] = [[] for _ in work.streams]
    reasons: list[str | None] = [None for _ in work.streams]
    counts = [0 for _ in work.streams]
    for index, piece, its_tokens in _parts(work):
        texts[index].append(piece.text)
        tokens[index] += its_tokens
        reasons[index] = piece.finish_reason
        counts[index] = piece.completion_tokens
    choices = [
        shape.choice(index, Part("".join(texts[index]), tuple(tokens[index]), reason))
        for index, reason in enumerate(reasons)
    ]
    return {
        **_head(work, shape.prefix, shape.object),
        "choices": choices,
        "usage": _usage(work, counts),
    }


def _events(work: Work, shape: Shape) -> Iterator[dict[str, Any] | None]:
    """Chunks of a streamed answer; None when there is nothing to say."""
    head = _head(work, shape.prefix, shape.chunk_object)
    options = work.job.request.stream_options
    counts = [0 for _ in work.streams]

    def chunk(choice: dict[str, Any]) -> dict[str, Any]:
        event = {**head, "choices": [choice]}
        if options.continuous_usage_stats:
            event["usage"] = _usage(work, counts)
        elif options.include_usage:
            event["usage"] = None
        return event

    for index in range(len(work.streams)):
        opening = shape.opening(index)
        if opening is not None:
            yield chunk(opening)
    for index, piece, tokens in _parts(work):
        counts[index] = piece.completion_tokens
        if piece.text:
            yield chunk(shape.delta(index, Part(piece.text, tokens)))
            tokens = ()
        if piece.finish_reason is not None:
            yield chunk(shape.delta(index, Part("", tokens, piece.finish_reason)))
        elif not piece.text:
            yield None
    if options.include_usage:
        yield {**head, "choices": [], "usage": _usage(work, counts)}


def _head(work: Work, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": work.serving.model_id,
    }


def _usage(work: Work, completion_tokens: Sequence[int]) -> dict[str, Any]:
    """Tokens of the request: a prompt counts once, however many answers it has."""
    firsts = work.streams[:: work.job.request.n]
    prompt = sum(stream.prompt_tokens for stream in firsts)
    completion = sum(completion_tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in firsts)},
    }
