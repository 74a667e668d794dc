"""POST /v1/chat/completions."""

from collections.abc import Mapping
from typing import Any

from flask import Flask
from flask import Response

from service.deployment import Deployment
from service.deployment import Serving
from service.text.chat import ids_of
from service.text.chat import render
from service.text.token_texts import token_texts
from service.web import answers
from service.web import forms
from service.web import generation
from service.web import logprobs
from service.web import routes
from service.web.admission import Slots
from service.web.choices import Choices
from service.web.generation import Job
from service.web.generation import Part
from service.web.generation import Work
from service.web.routes import Operation
from service.web.schemas import CHAT
from service.web.schemas import chat_request

HELLO = [{"role": "user", "content": "Say hello."}]
OPERATION = Operation(
    "Messages in, an answer out",
    answers.ChatCompletion,
    CHAT,
    events=answers.ChatChunk,
    errors=routes.OF_ANSWER,
    examples={
        "an answer": {"messages": HELLO, "max_tokens": 16},
        "a stream": {"messages": HELLO, "max_tokens": 16, "stream": True},
        "JSON": {
            "messages": HELLO,
            "max_tokens": 64,
            "response_format": {"type": "json_object"},
        },
    },
)


def add_routes(app: Flask, deployment: Deployment, slots: Slots) -> None:
    unknown_fields = deployment.config.server.unknown_fields

    def read(body: Mapping[str, Any], serving: Serving) -> Job:
        request, ignored = chat_request(body)
        generation.check_model(request.model, serving)
        tools = forms.tools_of(request, serving)
        prompt = render(serving.tokenizer, request.messages, serving.max_context, tools)
        constraint, left_out = forms.constraint(request, serving, prompt)
        generation.note_ignored([*ignored, *left_out], unknown_fields)
        return Job(
            request,
            (tuple(ids_of(serving.tokenizer, prompt)),),
            "messages",
            constraint=constraint,
            reading=forms.reading_of(request, serving, prompt),
        )

    def chat_completions() -> Response:
        return generation.answer(
            deployment, slots, read, lambda work: Choices(work, ChatShape(work))
        )

    routes.add(app, "/v1/chat/completions", chat_completions, OPERATION)


class ChatShape:
    """OpenAI's chat.completion and chat.completion.chunk."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, work: Work) -> None:
        self._texts = token_texts(work.serving.tokenizer)
        self._reported = work.job.request.reported is not None
        reading = work.job.reading
        self._readers = [None if reading is None else reading.reader() for _ in work.streams]
        self._thinks = reading is not None and reading.thinks

    @property
    def reasoning_tokens(self) -> int | None:
        if not self._thinks:
            return None
        return sum(reader.thought_tokens for reader in self._readers if reader is not None)

    def choice(self, index: int, answer: Part) -> dict[str, Any]:
        return {
            "index": index,
            "message": self._message(index, answer),
            "logprobs": logprobs.of_chat(self._texts, answer.tokens) if self._reported else None,
            "finish_reason": self._reason(index, answer),
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, Part(""))

    def delta(self, index: int, part: Part) -> dict[str, Any]:
        reader = self._readers[index]
        if reader is None:
            return self._chunk(index, {"content": part.text} if part.text else {}, part)
        deltas = forms.read(reader, part.steps)
        if part.finish_reason is not None:
            deltas += reader.finish()
        return self._chunk(index, forms.delta_of(deltas), part)

    def _message(self, index: int, answer: Part) -> dict[str, Any]:
        reader = self._readers[index]
        if reader is None:
            return {"role": "assistant", "content": answer.text, "refusal": None}
        return forms.message_of([*forms.read(reader, answer.steps), *reader.finish()])

    def _reason(self, index: int, part: Part) -> str | None:
        """Why the answer ended: to call tools, or as the engine says."""
        reader = self._readers[index]
        called = reader is not None and reader.calls > 0
        return "tool_calls" if called and part.finish_reason == "stop" else part.finish_reason

    def _chunk(self, index: int, delta: dict[str, Any], part: Part) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs.of_chat(self._texts, part.tokens) if part.tokens else None,
            "finish_reason": self._reason(index, part),
        }
