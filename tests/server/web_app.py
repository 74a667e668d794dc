"""The real web room around a fake engine, for a real gunicorn.

FAKE_ENGINE: "" answers at once; "hang" never ends an answer.
"""

import os

from flask import Flask

from service.config.schema import Config
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_engine import FakeEngine


def build(config: Config) -> Flask:
    engine = FakeEngine(hang=os.environ.get("FAKE_ENGINE") == "hang")
    return create_app(FakeDeployment(config, model=FakeServing(engine=engine)))
