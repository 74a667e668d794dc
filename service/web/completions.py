"""POST /v1/completions: raw prompts, as text or token ids."""

from collections.abc import Mapping
from typing import Any

from flask import Flask
from flask import Response

from service.deployment import Deployment
from service.deployment import Serving
from service.text.chat import encode_text
from service.web import generation
from service.web.admission import Slots
from service.web.generation import Answer
from service.web.generation import Job
from service.web.schemas import completion_request


def add_routes(app: Flask, deployment: Deployment, slots: Slots) -> None:
    unknown_fields = deployment.config.server.unknown_fields

    def read(body: Mapping[str, Any], serving: Serving) -> Job:
        request, ignored = completion_request(body)
        generation.note_ignored(ignored, unknown_fields)
        generation.check_model(request.model, serving)
        prompts = tuple(_encoded(prompt, serving) for prompt in request.prompts)
        return Job(request, prompts, "prompt")

    def completions() -> Response:
        return generation.answer(deployment, slots, read, CompletionShape())

    app.add_url_rule("/v1/completions", view_func=completions, methods=["POST"])


def _encoded(prompt: str | tuple[int, ...], serving: Serving) -> tuple[int, ...]:
    if isinstance(prompt, tuple):
        return prompt
    return tuple(encode_text(serving.tokenizer, prompt, serving.max_context))


class CompletionShape:
    """OpenAI's text_completion, whole and in chunks."""

    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self.delta(index, answer.text, answer.finish_reason)

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}
