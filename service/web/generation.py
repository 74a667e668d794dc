"""The way of every request for text: a slot, a body, prompts into the engine, answers out."""

import logging
import time
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
from service.errors import DeadlineExceeded
from service.errors import InvalidRequest
from service.errors import UnknownModel
from service.text.answer import Reading
from service.text.stream import Piece
from service.text.stream import Step
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
# The engine ends what is late between two steps; so long after, a step must be hanging.
HUNG_S = 2.0
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
    """What comes next of one answer, or all of it.

    tokens: with their logprobs, if those were asked for. completion_tokens: up to here.
    finish_reason: of the last part. steps: the text token by token, if answers are taken apart.
    """

    text: str
    tokens: tuple["Chosen", ...] = ()
    finish_reason: str | None = None
    completion_tokens: int = 0
    steps: tuple[Step, ...] = ()


class Writer(Protocol):
    """How the answers to one request are written in JSON: the difference between the endpoints.

    Either `whole` or `events` is called, once; they read the answers with `parts`.
    """

    ending: bytes

    def whole(self) -> dict[str, Any]:
        """All of it, when the answers are complete."""

    def events(self) -> Iterator[Mapping[str, Any] | None]:
        """The events of a stream; None when there is nothing to say."""

    def failed(self, error: Mapping[str, Any]) -> Mapping[str, Any]:
        """The event that ends a stream with an error, in place of the rest and of `ending`."""


@dataclass(frozen=True)
class Work:
    """A job that is in the engine. streams: `n` for each prompt, in the order of choices.

    deadline: seconds on the clock of `time.monotonic`.
    """

    job: Job
    serving: Serving
    streams: tuple[Stream, ...]
    environ: Mapping[str, Any]
    record: Record
    deadline: float

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()


def answer(
    deployment: Deployment,
    slots: Slots,
    read: Callable[[Mapping[str, Any], Serving], Job],
    make_writer: Callable[[Work], Writer],
) -> Response:
    """Answer the current request.

    read: turns the JSON body into a Job. The sequences are submitted before a streaming response
    is built, so that a full queue is a real 429 and a prompt that is too long a real 400.
    """
    # Before reading: a body that comes slowly keeps a thread as well.
    slot = slots.take(g.record.key)
    try:
        serving = slot.use(deployment, g.deadline)
        check_generates(serving)
        config = deployment.config
        job = read(read_json(request.environ, config.server.max_body), serving)
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
        writer = make_writer(work)
        if job.request.stream:
            body = sse.stream(writer.events(), g.request_id, writer.failed, writer.ending)
            response = sse.response(body)
            response.call_on_close(work.cancel)
            response.call_on_close(slot.release)
            return response
        result = jsonify(writer.whole())
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


def check_generates(serving: Serving) -> None:
    """Raise InvalidRequest for a model that gives embeddings only."""
    if serving.embeddings is not None:
        raise InvalidRequest(
            f"{serving.model_id} gives embeddings; it generates no text",
            param="model",
            hint="ask /v1/embeddings, or serve a model that generates",
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
    record.submitted(serving.model_id, sum(map(len, set(job.prompts))), streams)
    return Work(job, serving, tuple(streams), environ, record, deadline)


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
        temperature=first_of(wanted.temperature, serving.defaults.get("temperature"), 1.0),
        top_k=max(0, int(first_of(wanted.top_k, serving.defaults.get("top_k"), 0))),
        top_p=first_of(wanted.top_p, serving.defaults.get("top_p"), 1.0),
        min_p=first_of(wanted.min_p, serving.defaults.get("min_p"), 0.0),
        repetition_penalty=first_of(
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


def first_of(asked: float | None, recommended: float | None, otherwise: float) -> float:
    """What the request asks for, else the model's files, else OpenAI's default."""
    if asked is not None:
        return float(asked)
    return float(otherwise if recommended is None else recommended)


def _arriving(work: Work) -> Iterator[tuple[int, Piece]]:
    """Pieces of all answers as they come, with their index.

    Cancels everything if not read to the end. Raises ClientGone when the client has left (looked
    at every TICK_S, also while queued), DeadlineExceeded when a step hangs beyond it, or the error
    of a sequence.
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
                    if looked >= work.deadline + HUNG_S:
                        raise DeadlineExceeded("The request took longer than it was given.")
                if piece.finish_reason is not None:
                    del running[index]
                yield index, piece
    except BaseException as error:
        work.record.failed(error)
        work.cancel()
        raise


def parts(work: Work) -> Iterator[tuple[int, Part]]:
    """What comes of all answers, with their index; empty parts are moments without news.

    Tokens and steps wait for a part that is shown: text of several may come with the last only.
    Raises what `_arriving` raises.
    """
    told = [0 for _ in work.streams]
    held: list[tuple[Step, ...]] = [() for _ in work.streams]
    wanted = work.job.request.reported is not None
    for index, piece in _arriving(work):
        count = piece.completion_tokens
        held[index] += piece.steps
        if not piece.text and piece.finish_reason is None:
            yield index, Part("", completion_tokens=count)
            continue
        tokens: tuple[Chosen, ...] = ()
        if wanted:
            tokens = tuple(work.streams[index].logprobs[told[index] : count])
            told[index] = count
        steps, held[index] = held[index], ()
        yield index, Part(piece.text, tokens, piece.finish_reason, count, steps)


def prompt_tokens(work: Work) -> tuple[int, int]:
    """Tokens of all prompts, and how many of those were found computed.

    A prompt counts once, however many answers it has.
    """
    firsts = work.streams[:: work.job.request.n]
    found = sum(stream.cached_tokens for stream in firsts)
    return sum(stream.prompt_tokens for stream in firsts), found
