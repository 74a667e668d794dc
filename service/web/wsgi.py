"""The app that gunicorn serves."""

from flask import Flask

from service.config.schema import Config
from service.deployment import Deployment
from service.web import tracing
from service.web.app import create_app


def build(config: Config) -> Flask:
    """The Flask app around this configuration's deployment. Loads no model.

    In the worker: it may start the thread that sends spans.
    """
    return create_app(Deployment(config), tracing.start(config))
