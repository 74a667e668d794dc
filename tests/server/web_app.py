"""The real web room around a fake engine, for a real gunicorn.

FAKE_ENGINE: "" answers at once; "hang" never ends an answer; "slow" begins after a second.
FAKE_PAUSE_S: between comments in streams.
"""

import os
import threading
from collections.abc import Iterable

from flask import Flask

from service.config.schema import Config
from service.engine.params import SamplingParams
from service.engine.sequence import Stream
from service.web import sse
from service.web import tracing
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_engine import FakeEngine

DELAY_S = 1.0


class SlowEngine(FakeEngine):
    """Waits before it plays."""

    def _play(self, stream: Stream, params: SamplingParams, answer: Iterable[int]) -> None:
        play = super()._play
        threading.Timer(DELAY_S, lambda: play(stream, params, answer)).start()


def build(config: Config) -> Flask:
    how = os.environ.get("FAKE_ENGINE")
    sse.HEARTBEAT_S = float(os.environ.get("FAKE_PAUSE_S", sse.HEARTBEAT_S))
    engine = SlowEngine() if how == "slow" else FakeEngine(hang=how == "hang")
    deployment = FakeDeployment(config, model=FakeServing(engine=engine))
    return create_app(deployment, tracing.start(config))
