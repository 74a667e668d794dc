"""The Flask application around one deployment."""

from flask import Flask
from prometheus_client import CollectorRegistry

from service.deployment import Deployment
from service.web import chat
from service.web import completions
from service.web import docs
from service.web import embeddings
from service.web import failures
from service.web import metrics
from service.web import openapi
from service.web import operations
from service.web import page
from service.web import responses
from service.web import security
from service.web import tokens
from service.web.access import Observer
from service.web.admission import Slots
from service.web.latency import Latencies
from service.web.limits import Accounts
from service.web.tracing import Tracing


def create_app(deployment: Deployment, tracing: Tracing | None = None) -> Flask:
    """The WSGI application. Nothing is loaded here: gunicorn's hooks call
    `app.extensions["moorage"].start()` after the fork and `.drain(seconds)` at the end, and last
    of all, with seconds, each function in `app.extensions["moorage_farewells"]`.
    """
    app = Flask("moorage", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # a redirect would be HTML
    app.extensions["moorage"] = deployment
    failures.handle_errors(app)
    accounts = Accounts(lambda: deployment.config.server.key_limits)
    registry = CollectorRegistry()
    observers: list[Observer] = [Latencies(registry, deployment.config.server.metrics_prefix)]
    if tracing is not None:
        observers.append(tracing)
    app.extensions["moorage_farewells"] = () if tracing is None else (tracing.flush,)
    security.guard(app, deployment.config, accounts, observers)
    slots = Slots(deployment.config.server.threads, accounts)
    chat.add_routes(app, deployment, slots)
    completions.add_routes(app, deployment, slots)
    embeddings.add_routes(app, deployment, slots)
    responses.add_routes(app, deployment, slots)
    tokens.add_routes(app, deployment, slots)
    operations.add_routes(app, deployment)
    metrics.add_routes(app, deployment, registry)
    openapi.add_routes(app, deployment)
    docs.add_routes(app)
    page.add_routes(app)
    return app
