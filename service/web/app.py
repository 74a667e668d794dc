"""The Flask application around one deployment."""

from flask import Flask

from service.deployment import Deployment
from service.web import chat
from service.web import completions
from service.web import failures
from service.web import operations
from service.web import security
from service.web.admission import Slots


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
    security.guard(app, deployment.config.api_keys)
    slots = Slots(deployment.config.server.threads)
    chat.add_routes(app, deployment, slots)
    completions.add_routes(app, deployment, slots)
    operations.add_routes(app, deployment)
    return app
