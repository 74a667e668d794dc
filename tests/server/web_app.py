"""The real web room around a fake engine, for a real gunicorn.

FAKE_ENGINE: "" answers at once; "hang" never ends an answer; "slow" has nothing for a while.
FAKE_PAUSE_S: between comments in streams.
"""

import os
import time

from flask import Flask

from service.config.schema import Config
from service.engine.sequence import Stream
from service.web import sse
from service.web import tracing
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_engine import FakeEngine

TIMES = 4


class SlowStream(Stream):
    """Has nothing the first times somebody waits for it."""

    times = 0

    def read(self, timeout_s: float | None = None) -> list[int]:
        self.times += 1
        if self.times <= TIMES:
            time.sleep(timeout_s or 0)
            raise TimeoutError
        return super().read(timeout_s)


def build(config: Config) -> Flask:
    how = os.environ.get("FAKE_ENGINE")
    sse.HEARTBEAT_S = float(os.environ.get("FAKE_PAUSE_S", sse.HEARTBEAT_S))
    stream = SlowStream if how == "slow" else Stream
    engine = FakeEngine(hang=how == "hang", stream=stream)
    deployment = FakeDeployment(config, model=FakeServing(engine=engine))
    return create_app(deployment, tracing.start(config))
