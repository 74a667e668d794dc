"""POST /tokenize and POST /detokenize, in vLLM's shapes."""

import sys
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from flask import Flask
from flask import Response
from flask import g
from flask import jsonify
from flask import request

from service.deployment import Deployment
from service.deployment import Serving
from service.errors import InvalidRequest
from service.text import tokenizing
from service.text.chat import encode
from service.web import answers
from service.web import formats
from service.web import forms
from service.web import generation
from service.web import routes
from service.web import schemas
from service.web.admission import Slots
from service.web.body import read_json
from service.web.routes import Operation
from service.web.shapes import Ids
from service.web.shapes import Object
from service.web.values import Flag
from service.web.values import Text

TOKENIZE = Object(
    {
        "model": Text(),
        "prompt": Text(),
        "messages": schemas.MESSAGES,
        "tools": formats.TOOLS,
        "add_special_tokens": Flag(),
        "return_token_strs": Flag(),
    },
    not_done={
        "add_generation_prompt": (True,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "mm_processor_kwargs": ({},),
    },
    one_of=("prompt", "messages"),
)
DETOKENIZE = Object({"model": Text(), "tokens": Ids()}, ["tokens"])
Answer = Callable[[Mapping[str, Any], Serving], dict[str, Any]]


def add_routes(app: Flask, deployment: Deployment, slots: Slots) -> None:
    server = deployment.config.server

    def answered(answer: Answer) -> Response:
        slot = slots.take(g.record.key)
        try:
            serving = slot.use(deployment, g.deadline)
            most = deployment.config.server.max_body
            return jsonify(answer(read_json(request.environ, most), serving))
        finally:
            slot.release()

    def tokenize() -> Response:
        return answered(_tokenize)

    def detokenize() -> Response:
        return answered(_detokenize)

    def _tokenize(body: Mapping[str, Any], serving: Serving) -> dict[str, Any]:
        unknown: list[str] = []
        kept = TOKENIZE.check("", body, unknown)
        _check_model(kept, serving)
        if "prompt" in kept and "messages" in kept:
            raise InvalidRequest("give either prompt or messages", param="prompt")
        strings = kept.get("return_token_strs", False)
        if "prompt" in kept:
            special = kept.get("add_special_tokens", True)
            if kept.get("tools"):
                raise InvalidRequest("tools go with messages, not with a prompt", param="tools")
            ids = tokenizing.token_ids(serving.tokenizer, kept["prompt"], special=special)
        else:
            ids = _of_messages(kept, serving)
        generation.note_ignored(unknown, server.unknown_fields)
        shown = tokenizing.token_strings(serving.tokenizer, ids) if strings else None
        return {
            "count": len(ids),
            "max_model_len": serving.max_context,
            "tokens": ids,
            "token_strs": shown,
        }

    def _detokenize(body: Mapping[str, Any], serving: Serving) -> dict[str, Any]:
        unknown: list[str] = []
        kept = DETOKENIZE.check("", body, unknown)
        generation.note_ignored(unknown, server.unknown_fields)
        _check_model(kept, serving)
        given = kept["tokens"]
        limit = tokenizing.id_limit(serving.tokenizer)
        for at, token in enumerate(given):
            if not 0 <= token < limit:
                raise InvalidRequest(
                    f"tokens[{at}] must be one of this model's ids, 0 to {limit - 1}",
                    param=f"tokens[{at}]",
                )
        return {"prompt": tokenizing.text_of(serving.tokenizer, given)}

    into = Operation(
        "Text to token ids",
        answers.Tokens,
        TOKENIZE,
        errors=routes.OF_BODY,
        examples={
            "a prompt": {"prompt": "Hello", "return_token_strs": True},
            "a conversation": {"messages": [{"role": "user", "content": "Hello"}]},
        },
        said="Either `prompt` or `messages`. Nothing is generated.",
    )
    routes.add(app, "/tokenize", tokenize, into)
    back = Operation(
        "Token ids to text",
        answers.Prompt,
        DETOKENIZE,
        errors=routes.OF_BODY,
        examples={"two tokens": {"tokens": [1, 2]}},
    )
    routes.add(app, "/detokenize", detokenize, back)


def _of_messages(kept: Mapping[str, Any], serving: Serving) -> list[int]:
    """A conversation as /v1/chat/completions would run it, however long it is."""
    if kept.get("add_special_tokens", False):
        said = "add_special_tokens must be false with messages: the chat template has them"
        raise InvalidRequest(said, param="add_special_tokens")
    given = {name: kept[name] for name in ("messages", "tools") if name in kept}
    asked, _ = schemas.chat_request({"model": serving.model_id, **given})
    tools = forms.tools_of(asked, serving)
    return encode(serving.tokenizer, asked.messages, sys.maxsize, tools)


def _check_model(kept: Mapping[str, Any], serving: Serving) -> None:
    """The name may be left out, as vLLM lets it."""
    generation.check_model(kept.get("model", serving.model_id), serving)
