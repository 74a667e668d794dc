"""A Flask app with a deployment that behaves as FAKE_LOAD says, for a real gunicorn.

FAKE_LOAD: "" becomes ready; "hang" never does; "crash" is killed while loading; otherwise the name
of a class of service.errors with which the load fails. FAKE_DRAIN: "hang", "raise" or nothing.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator

from flask import Flask
from flask import Response
from flask import jsonify
from flask import request

import service.errors
from service.config.schema import Config
from service.errors import ServiceError


class FakeDeployment:
    on_ready: Callable[[str], None]
    on_failure: Callable[[ServiceError], None]
    on_death: Callable[[], None]
    embeds = False

    def __init__(self) -> None:
        self.state = "created"
        self.running = 0
        self.finish = False
        self.cut = False
        self.deadline = float("inf")
        self.changed = threading.Condition()

    def start(self) -> None:
        self.state = "loading"
        threading.Thread(target=self.load, daemon=True).start()

    def load(self) -> None:
        behaviour = os.environ.get("FAKE_LOAD", "")
        if behaviour == "hang":
            threading.Event().wait()
        if behaviour == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour:
            error = getattr(service.errors, behaviour)
            self.on_failure(error("the fake does\nnot load", hint="use a real one"))
            self.state = "failed"
            return
        with self.changed:  # whoever sees that it is ready finds the ready line in the log
            self.state = "ready"
            self.on_ready("fake-model")

    def drain(self, seconds: float) -> None:
        if os.environ.get("FAKE_DRAIN") == "hang":
            threading.Event().wait()
        if os.environ.get("FAKE_DRAIN") == "raise":
            raise RuntimeError("the drain is broken")
        with self.changed:
            self.state = "draining"
            self.deadline = min(self.deadline, time.monotonic() + seconds)
            self.changed.notify_all()
            while self.running and not self.cut:
                left = self.deadline - time.monotonic()
                if left <= 0:
                    self.cut = True
                    self.changed.notify_all()
                else:
                    self.changed.wait(left)
            self.changed.wait_for(lambda: not self.running, 5)

    def stream(self) -> Iterator[str]:
        yield "data: first\n\n"
        with self.changed:
            self.changed.wait_for(lambda: self.finish or self.cut)
        yield "data: last\n\n" if self.finish else 'data: {"error": "ended"}\n\n'

    def ended(self) -> None:
        with self.changed:
            self.running -= 1
            self.changed.notify_all()


def create_app(config: Config) -> Flask:
    if os.environ.get("FAKE_APP") == "broken":
        raise service.errors.ModelUnavailable("there is no such model", hint="fetch it")
    app = Flask("fake")
    deployment = app.extensions["moorage"] = FakeDeployment()

    @app.get("/ready")
    def ready() -> tuple[Response, int]:
        with deployment.changed:
            state = deployment.state
        return jsonify(state=state), 200 if state == "ready" else 503

    @app.get("/process")
    def process() -> Response:
        threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
        known = {"threads": config.server.threads, "name": config.name}
        return jsonify(pid=os.getpid(), environment=threads, config=known)

    @app.get("/stream")
    def stream() -> Response:
        with deployment.changed:
            deployment.running += 1
        response = Response(deployment.stream(), mimetype="text/event-stream")
        response.call_on_close(deployment.ended)
        return response

    @app.post("/finish")
    def finish() -> str:
        with deployment.changed:
            deployment.finish = True
            deployment.changed.notify_all()
        return ""

    @app.get("/wide")
    def wide() -> Response:
        return Response(bytes(1_000_000) for _ in range(100))

    @app.get("/stuck")
    def stuck() -> str:
        threading.Event().wait()
        return ""

    @app.post("/length")
    def length() -> str:
        return str(len(request.get_data()))

    @app.post("/die")
    def die() -> str:
        deployment.on_death()
        return ""

    return app
