"""An application around a fake engine, and short ways to ask it."""

from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_client(engine: FakeEngine) -> Callable[..., FlaskClient]:
    """make_client(threads=9, api_keys=["k"], state="loading", ...): server settings and state."""

    def make(*, state: str = "ready", progress: float = 1.0, **config: Any) -> FlaskClient:
        serving = FakeServing(engine=engine)
        deployment = FakeDeployment(fake_config(**config), state, progress, serving)
        return create_app(deployment).test_client()

    return make


@pytest.fixture
def client(make_client: Callable[..., FlaskClient]) -> FlaskClient:
    return make_client()
