"""The Flask application around one deployment."""

from flask import Flask

from service.deployment import Deployment
from service.web import chat
from service.web import completions
from service.web import failures
from service.web import metrics
from service.web import operations
from service.web import security
from service.web import tokens
from service.web.admission import Slots
from service.web.limits import Accounts


def create_app(deployment: Deployment) -> Flask:
    """The WSGI application. Nothing is loaded here: gunicorn's hooks call
    `app.extensions["moorage"].start()` after the fork and `.drain(seconds)` at the end.
    """
    app = Flask("moorage", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # a redirect would be HTML
    app.extensions["moorage"] = deployment
    failures.handle_errors(app)
    accounts = Accounts(deployment.config.server.key_limits)
    security.guard(app, deployment.config, accounts)
    slots = Slots(deployment.config.server.threads, accounts)
    chat.add_routes(app, deployment, slots)
    completions.add_routes(app, deployment, slots)
    tokens.add_routes(app, deployment, slots)
    operations.add_routes(app, deployment)
    metrics.add_routes(app, deployment)
    return app
