"""POST /v1/responses: a chat in OpenAI's other words. Nothing is stored."""

import re
from collections.abc import Callable
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any
from typing import cast

from flask import Flask
from flask import Response

from service.deployment import Deployment
from service.deployment import Serving
from service.errors import InvalidRequest
from service.errors import UnknownResponse
from service.errors import UnsupportedParameter
from service.text.chat import ids_of
from service.text.chat import render
from service.web import forms
from service.web import generation
from service.web import responses_answers
from service.web import routes
from service.web.admission import Slots
from service.web.body import short
from service.web.generation import Job
from service.web.generation import Work
from service.web.responses_events import Responses
from service.web.responses_schema import LOGPROBS
from service.web.responses_schema import RESPONSE
from service.web.responses_schema import Asked
from service.web.responses_schema import ResponseRequest
from service.web.responses_schema import response_request
from service.web.routes import Operation

if TYPE_CHECKING:
    from service.text.constraints import TokenConstraint

# fields of a chat, as its errors name them, and what they are called here
_NAMES = re.compile(
    r"\bmessages\[(?P<message>\d+)\]\.(?P<key>\w+)(\[\d+\])?"
    r"|\btools\[(?P<tool>\d+)\](\.function)?"
    r"|\b(?P<format>response_format)(\.json_schema)?"
)

OPERATION = Operation(
    "Items in, an answer out: messages, function calls and thoughts",
    responses_answers.Response,
    RESPONSE,
    events=responses_answers.ResponseEvent,
    errors=routes.OF_ANSWER,
    examples={
        "an answer": {"input": "Say hello.", "max_output_tokens": 16},
        "a stream": {"input": "Say hello.", "max_output_tokens": 16, "stream": True},
        "JSON": {
            "instructions": "Answer in JSON.",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello."}]}],
            "max_output_tokens": 64,
            "text": {"format": {"type": "json_object"}},
        },
    },
)
NOT_STORED = Operation("Always 404: no response is stored", None, errors=(UnknownResponse,))


def add_routes(app: Flask, deployment: Deployment, slots: Slots) -> None:
    unknown_fields = deployment.config.server.unknown_fields

    def read(body: Mapping[str, Any], serving: Serving) -> Job:
        asked, ignored = response_request(body)
        generation.check_model(asked.request.model, serving)
        try:
            job, left_out = _job(asked, serving)
        except InvalidRequest as error:
            raise _renamed(error, asked) from error
        left_out = [_in_our_words(name, asked) for name in left_out]
        generation.note_ignored([*ignored, *left_out], unknown_fields)
        return job

    def write(work: Work) -> Responses:
        return Responses(work, cast(ResponseRequest, work.job.request))

    def responses() -> Response:
        return generation.answer(deployment, slots, read, write)

    # Clients that ask for what was never stored learn why it is not there.
    def stored_response(response_id: str) -> Response:
        raise _unknown(response_id)

    def delete_response(response_id: str) -> Response:
        raise _unknown(response_id)

    routes.add(app, "/v1/responses", responses, OPERATION)
    path = "/v1/responses/<response_id>"
    routes.add(app, path, stored_response, NOT_STORED)
    routes.add(app, path, delete_response, NOT_STORED, "DELETE")


def _unknown(response_id: str) -> UnknownResponse:
    return UnknownResponse(
        f"there is no response {short(response_id)}: this server stores none",
        hint="keep the answer of POST /v1/responses, and send its items back in input",
    )


def _job(asked: Asked, serving: Serving) -> tuple[Job, list[str]]:
    request = asked.request
    tools = forms.tools_of(request, serving)
    prompt = render(serving.tokenizer, request.messages, serving.max_context, tools)
    constraint, left_out = _constraint(asked, serving, prompt)
    reading = forms.reading_of(request, serving, prompt)
    if request.logprobs and reading is not None:
        raise UnsupportedParameter(
            f"include: {LOGPROBS} are not told of answers that may have thoughts or calls",
            param="include",
            hint="leave it out, or ask /v1/chat/completions for logprobs",
        )
    ids = tuple(ids_of(serving.tokenizer, prompt))
    return Job(request, (ids,), "input", constraint=constraint, reading=reading), left_out


def _constraint(
    asked: Asked, serving: Serving, prompt: str
) -> tuple[Callable[[], "TokenConstraint"] | None, list[str]]:
    """As of a chat. Tools that do not say whether they are strict are, where that can be."""
    if asked.lenient is not None:
        try:
            return forms.constraint(asked.request, serving, prompt)
        except InvalidRequest:  # of the strictness that nobody asked for, or it comes again
            return forms.constraint(asked.lenient, serving, prompt)
    return forms.constraint(asked.request, serving, prompt)


def _renamed(error: InvalidRequest, asked: Asked) -> InvalidRequest:
    """An error of the chat, in the words of this endpoint."""
    param = None if error.param is None else _in_our_words(error.param, asked)
    message = _in_our_words(error.message, asked)
    if error.param == "messages":
        param, message = "input", re.sub(r"\bmessages has\b", "input has", message)
    return type(error)(message, param=param, hint=error.hint)


def _in_our_words(text: str, asked: Asked) -> str:
    def ours(found: re.Match[str]) -> str:
        if found["format"] is not None:
            return "text.format"
        if found["tool"] is not None:
            return f"tools[{asked.tools[int(found['tool'])]}]"
        return asked.origins.get((int(found["message"]), found["key"]), "input")

    return _NAMES.sub(ours, text)
