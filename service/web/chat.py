"""POST /v1/chat/completions."""

from collections.abc import Mapping
from typing import Any

from flask import Flask
from flask import Response

from service.deployment import Deployment
from service.deployment import Serving
from service.text.chat import encode
from service.web import generation
from service.web.admission import Slots
from service.web.generation import Answer
from service.web.generation import Job
from service.web.schemas import chat_request


def add_routes(app: Flask, deployment: Deployment, slots: Slots) -> None:
    unknown_fields = deployment.config.server.unknown_fields

    def read(body: Mapping[str, Any], serving: Serving) -> Job:
        request, ignored = chat_request(body)
        generation.note_ignored(ignored, unknown_fields)
        generation.check_model(request.model, serving)
        ids = encode(serving.tokenizer, request.messages, serving.max_context)
        return Job(request, (tuple(ids),), "messages")

    def chat_completions() -> Response:
        return generation.answer(deployment, slots, read, ChatShape())

    app.add_url_rule("/v1/chat/completions", view_func=chat_completions, methods=["POST"])


class ChatShape:
    """OpenAI's chat.completion and chat.completion.chunk."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return _chunk(index, {"role": "assistant", "content": "", "refusal": None}, None)

    def delta(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return _chunk(index, {"content": text} if text else {}, finish_reason)


def _chunk(index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
