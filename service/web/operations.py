"""What operators and clients ask about the server itself: health, placement, models."""

from typing import Any

from flask import Flask
from flask import Response
from flask import jsonify

from service.deployment import Deployment
from service.deployment import Serving
from service.errors import NotReady
from service.errors import PlacementDrifted
from service.text.tools import tool_use
from service.web import schemas
from service.web.failures import error_response
from service.web.generation import check_model


def add_routes(app: Flask, deployment: Deployment) -> None:
    def health_live() -> Response:
        return jsonify({"status": "live"})

    def health_ready() -> Response:
        try:
            serving = deployment.probed()
        except (NotReady, PlacementDrifted) as error:  # not logged: probes ask every few seconds
            return error_response(error, state=deployment.state, progress=deployment.progress)
        return jsonify({"status": "ready", "state": deployment.state, "model": serving.model_id})

    def placement() -> Response:
        return jsonify(deployment.document())

    def models() -> Response:
        return jsonify({"object": "list", "data": [_model(deployment.serving())]})

    def model(model_id: str) -> Response:
        serving = deployment.serving()
        check_model(model_id, serving)
        return jsonify(_model(serving))

    app.add_url_rule("/health/live", view_func=health_live)
    app.add_url_rule("/health/ready", view_func=health_ready)
    app.add_url_rule("/placement", view_func=placement)
    app.add_url_rule("/v1/models", view_func=models)
    # Ids of the hub have a slash.
    app.add_url_rule("/v1/models/<path:model_id>", view_func=model)


def _model(serving: Serving) -> dict[str, Any]:
    return {
        "id": serving.model_id,
        "object": "model",
        "created": serving.created,
        "owned_by": "moorage",
        "max_model_len": serving.max_context,
        "context_length": serving.max_context,
        "capabilities": _capabilities(serving),
    }


def _capabilities(serving: Serving) -> dict[str, bool]:
    """What may be asked of this model here."""
    chat = serving.tokenizer.chat_template is not None
    tools = chat and tool_use(serving.tokenizer)
    return {
        "chat": chat,
        "completions": True,
        "streaming": True,
        "tools": bool(tools and tools.shown and tools.format is not None),
        "structured_output": "response_format" in schemas.CHAT_DONE,
        "logprobs": "logprobs" in schemas.CHAT_DONE,
    }
