"""What operators and clients ask about the server itself: health, placement, models."""

from dataclasses import replace
from typing import Any

from flask import Flask
from flask import Response
from flask import jsonify

from service.deployment import Deployment
from service.deployment import Serving
from service.errors import NotReady
from service.errors import PlacementDrifted
from service.errors import UnknownModel
from service.text.tools import tool_use
from service.web import answers
from service.web import routes
from service.web import schemas
from service.web.failures import error_response
from service.web.generation import check_model
from service.web.routes import Operation


def add_routes(app: Flask, deployment: Deployment) -> None:
    def health_live() -> Response:
        return jsonify({"status": "live"})

    def health_ready() -> Response:
        return readiness()

    def health() -> Response:
        return readiness()

    def readiness() -> Response:
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

    live = Operation("Whether the process is up", answers.Live)
    routes.add(app, "/health/live", health_live, live)
    ready = Operation(
        "Whether there is a proven model",
        answers.Ready,
        errors=routes.OF_MODEL,
        special={503: answers.NotReadyError},
    )
    routes.add(app, "/health/ready", health_ready, ready)
    # vLLM's name, which many clients and load balancers ask
    routes.add(app, "/health", health, replace(ready, summary="The same as /health/ready"))
    planned = Operation("Plan, certificate and state of the deployment", answers.Placement)
    routes.add(app, "/placement", placement, planned)
    listed = Operation("The model that is served", answers.Models, errors=routes.OF_MODEL)
    routes.add(app, "/v1/models", models, listed)
    # Ids of the hub have a slash.
    named = Operation("The same, by its id", answers.Model, errors=(UnknownModel, *routes.OF_MODEL))
    routes.add(app, "/v1/models/<path:model_id>", model, named)


def _model(serving: Serving) -> dict[str, Any]:
    gives = serving.embeddings
    return {
        "id": serving.model_id,
        "object": "model",
        "created": serving.created,
        "owned_by": "moorage",
        "max_model_len": serving.max_context,
        "context_length": serving.max_context,
        **({} if gives is None else {"embedding_dimension": gives.dimension}),
        "capabilities": _capabilities(serving),
    }


def _capabilities(serving: Serving) -> dict[str, bool]:
    """What may be asked of this model here."""
    generates = serving.embeddings is None
    chat = generates and serving.tokenizer.chat_template is not None
    tools = chat and tool_use(serving.tokenizer)
    return {
        "chat": chat,
        "completions": generates,
        "embeddings": not generates,
        "streaming": generates,
        "tools": bool(tools and tools.shown and tools.format is not None),
        "structured_output": generates and "response_format" in schemas.CHAT_DONE,
        "logprobs": generates and "logprobs" in schemas.CHAT_DONE,
    }
