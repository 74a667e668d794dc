"""POST /v1/completions: raw prompts, as text or token ids."""

from collections.abc import Mapping
from itertools import repeat
from typing import TYPE_CHECKING
from typing import Any

from flask import Flask
from flask import Response

from service.deployment import Deployment
from service.deployment import Serving
from service.errors import InvalidRequest
from service.text.chat import encode_text
from service.text.token_texts import token_texts
from service.web import answers
from service.web import generation
from service.web import logprobs
from service.web import routes
from service.web.admission import Slots
from service.web.choices import Choices
from service.web.generation import Job
from service.web.generation import Part
from service.web.generation import Work
from service.web.logprobs import CompletionLogprobs
from service.web.routes import Operation
from service.web.schemas import COMPLETION
from service.web.schemas import completion_request

if TYPE_CHECKING:
    from service.engine.choosing import Chosen

OPERATION = Operation(
    "Raw prompts in, their continuations out",
    answers.Completion,
    COMPLETION,
    events=answers.CompletionChunk,
    errors=routes.OF_ANSWER,
    examples={
        "a text": {"prompt": "Once upon a time", "max_tokens": 16},
        "two texts, streamed": {"prompt": ["One", "Two"], "max_tokens": 4, "stream": True},
        "scores of a prompt": {"prompt": "Hi", "max_tokens": 0, "echo": True, "logprobs": 1},
    },
)


def add_routes(app: Flask, deployment: Deployment, slots: Slots) -> None:
    unknown_fields = deployment.config.server.unknown_fields

    def read(body: Mapping[str, Any], serving: Serving) -> Job:
        request, ignored = completion_request(body)
        generation.note_ignored(ignored, unknown_fields)
        generation.check_model(request.model, serving)
        prompts = tuple(_encoded(prompt, serving) for prompt in request.prompts)
        if not request.echo:
            return Job(request, prompts, "prompt")
        echo = tuple(map(_text_of, request.prompts, prompts, repeat(serving)))
        scored = 0 if request.limit == 0 else None
        if request.logprobs is not None:
            scored = request.logprobs
        return Job(request, prompts, "prompt", echo, scored)

    def completions() -> Response:
        return generation.answer(
            deployment, slots, read, lambda work: Choices(work, CompletionShape(work))
        )

    routes.add(app, "/v1/completions", completions, OPERATION)


def _encoded(prompt: str | tuple[int, ...], serving: Serving) -> tuple[int, ...]:
    if isinstance(prompt, tuple):
        return prompt
    return tuple(encode_text(serving.tokenizer, prompt, serving.max_context))


def _text_of(prompt: str | tuple[int, ...], ids: tuple[int, ...], serving: Serving) -> str:
    """A prompt as it is echoed. Raises InvalidRequest for an id that no tokenizer can read."""
    if isinstance(prompt, str):
        return prompt
    try:
        text = serving.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    except (OverflowError, TypeError, ValueError) as error:  # beyond 32 bits, or negative
        raise InvalidRequest("the prompt has a token that is no id", param="prompt") from error
    return text if isinstance(text, str) else "".join(text)


class CompletionShape:
    """OpenAI's text_completion, whole and in chunks."""

    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"
    reasoning_tokens = None  # a prompt that somebody wrote has no thoughts that are known

    def __init__(self, work: Work) -> None:
        self._job = work.job
        self._streams = work.streams
        self._reported = work.job.request.reported is not None
        texts = token_texts(work.serving.tokenizer)
        self._logprobs = [CompletionLogprobs(texts) for _ in work.streams]
        self._begun = [not work.job.echo for _ in work.streams]

    def choice(self, index: int, answer: Part) -> dict[str, Any]:
        return self.delta(index, answer)

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, index: int, part: Part) -> dict[str, Any]:
        # an echo waits for the first part of the answer: by then the prompt has been scored
        begins, self._begun[index] = not self._begun[index], True
        echo = self._job.echo[index // self._job.request.n] if begins else ""
        found = self._logprobs_of(index, part, echo if begins else None) if self._reported else None
        return {
            "text": echo + part.text,
            "index": index,
            "logprobs": found,
            "finish_reason": part.finish_reason,
        }

    def _logprobs_of(self, index: int, part: Part, echo: str | None) -> dict[str, Any]:
        """Those of the prompt if it is echoed now, of the part, and of the token that ended it.

        The last has no text, but is told as OpenAI does: lm-eval counts on a token behind a prompt.
        """
        stream, logs = self._streams[index], self._logprobs[index]
        tokens: tuple[Chosen, ...] = part.tokens
        if part.finish_reason is not None and stream.ending is not None:
            tokens = (*tokens, stream.ending)
        if echo is None:
            return logs.of(tokens)
        ids = self._job.prompts[index // self._job.request.n]
        return logprobs.join(logs.of_prompt(echo, ids, stream.prompt_logprobs), logs.of(tokens))
