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
from service.web import fields
from service.web import forms
from service.web import generation
from service.web.admission import Slots
from service.web.body import kind
from service.web.body import read_json
from service.web.schemas import chat_request

OPTIONS = {"add_special_tokens", "return_token_strs"}
DONE = frozenset({"model", "prompt", "messages", "tools"} | OPTIONS)
NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
}
Answer = Callable[[Mapping[str, Any], Serving], dict[str, Any]]


def add_routes(app: Flask, deployment: Deployment, slots: Slots) -> None:
    server = deployment.config.server

    def answered(answer: Answer) -> Response:
        serving = deployment.serving()
        slot = slots.take(g.record.key)
        try:
            return jsonify(answer(read_json(request.environ, server.max_body), serving))
        finally:
            slot.release()

    def tokenize() -> Response:
        return answered(_tokenize)

    def detokenize() -> Response:
        return answered(_detokenize)

    def _tokenize(body: Mapping[str, Any], serving: Serving) -> dict[str, Any]:
        kept, unknown = fields.keep_done(body, DONE, (), NOT_DONE)
        _check_model(kept, serving)
        if ("prompt" in kept) == ("messages" in kept):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        strings = _flag(kept, "return_token_strs", otherwise=False)
        if "prompt" in kept:
            special = _flag(kept, "add_special_tokens", otherwise=True)
            if not isinstance(kept["prompt"], str):
                said = f"prompt must be a string, not {kind(kept['prompt'])}"
                raise InvalidRequest(said, param="prompt")
            if kept.get("tools"):
                raise InvalidRequest("tools go with messages, not with a prompt", param="tools")
            ids = tokenizing.token_ids(serving.tokenizer, kept["prompt"], special=special)
        else:
            ids = _of_messages(kept, unknown, serving)
        generation.note_ignored(unknown, server.unknown_fields)
        shown = tokenizing.token_strings(serving.tokenizer, ids) if strings else None
        return {
            "count": len(ids),
            "max_model_len": serving.max_context,
            "tokens": ids,
            "token_strs": shown,
        }

    def _detokenize(body: Mapping[str, Any], serving: Serving) -> dict[str, Any]:
        kept, unknown = fields.keep_done(body, {"model", "tokens"}, (), {})
        generation.note_ignored(unknown, server.unknown_fields)
        _check_model(kept, serving)
        given = kept.get("tokens")
        if not isinstance(given, list):
            said = "is missing" if given is None else f"must be an array, not {kind(given)}"
            raise InvalidRequest(f"tokens {said}", param="tokens")
        limit = tokenizing.id_limit(serving.tokenizer)
        for at, token in enumerate(given):
            if type(token) is not int or not 0 <= token < limit:
                raise InvalidRequest(
                    f"tokens[{at}] must be one of this model's ids, 0 to {limit - 1}",
                    param=f"tokens[{at}]",
                )
        return {"prompt": tokenizing.text_of(serving.tokenizer, given)}

    app.add_url_rule("/tokenize", view_func=tokenize, methods=["POST"])
    app.add_url_rule("/detokenize", view_func=detokenize, methods=["POST"])


def _of_messages(kept: Mapping[str, Any], unknown: list[str], serving: Serving) -> list[int]:
    """A conversation as /v1/chat/completions would run it, however long it is."""
    if _flag(kept, "add_special_tokens", otherwise=False):
        said = "add_special_tokens must be false with messages: the chat template has them"
        raise InvalidRequest(said, param="add_special_tokens")
    given = {name: kept[name] for name in ("messages", "tools") if name in kept}
    asked, more = chat_request({"model": serving.model_id, **given})
    unknown += more
    tools = forms.tools_of(asked, serving)
    return encode(serving.tokenizer, asked.messages, sys.maxsize, tools)


def _check_model(kept: Mapping[str, Any], serving: Serving) -> None:
    """The name may be left out, as vLLM lets it."""
    name = kept.get("model", serving.model_id)
    if not isinstance(name, str):
        raise InvalidRequest(f"model must be a string, not {kind(name)}", param="model")
    generation.check_model(name, serving)


def _flag(kept: Mapping[str, Any], name: str, *, otherwise: bool) -> bool:
    value = kept.get(name, otherwise)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {kind(value)}", param=name)
    return value
