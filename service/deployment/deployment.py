"""What the web room and the process ask of a deployment, and the thread that brings it up.

Everything runs in the worker, after the fork, in a loader thread, so that health and placement
answer meanwhile.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from service.config.schema import Config
from service.deployment import drift
from service.deployment.attempt import bring_up
from service.deployment.serving import Serving
from service.deployment.status import ENDS
from service.deployment.status import Ended
from service.deployment.status import Status
from service.errors import LoadFailed
from service.errors import NotReady
from service.errors import PlacementDrifted
from service.errors import ServiceError

log = logging.getLogger(__name__)


class Deployment:
    """The deployment of this process. Methods may be called from any thread.

    Whoever runs the process sets the three callbacks before `start`: on_ready gets the model's id,
    on_failure the error that ended the start, on_death is called when the engine died, or its
    model changed, while serving.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.on_ready: Callable[[str], None] = lambda model_id: None
        self.on_failure: Callable[[ServiceError], None] = lambda error: None
        self.on_death: Callable[[], None] = lambda: None
        self._status = Status(config)

    @property
    def state(self) -> str:
        """planned, loading, validating, ready, degraded, draining or failed."""
        return self._status.state

    @property
    def progress(self) -> float:
        """Of the load, 0..1."""
        return self._status.progress

    @property
    def error(self) -> ServiceError | None:
        """What ended the start or the serving."""
        return self._status.error

    def start(self) -> None:
        """Load in the background and return at once."""
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def serving(self) -> Serving:
        """The model that answers. Raises NotReady, with state and progress in its message, or
        PlacementDrifted, with what changed.
        """
        status = self._status
        serving = status.serving
        changed = status.watch.error() if status.watch and status.state == "degraded" else None
        if changed is not None:
            raise changed
        if serving is None or status.state != "ready" or not serving.engine.alive:
            doing = status.state
            if doing == "loading":
                doing = f"{doing} {status.progress:.0%}"
            raise NotReady(f"The model is not ready: {doing}. Try again later.")
        return serving

    def probed(self) -> Serving:
        """`serving`, for a readiness probe: looks first whether the model has changed."""
        if self._status.watch is not None and self.state == "ready":
            self._status.watch.probe()
        return self.serving()

    def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs finish within `seconds`, then end the rest."""
        with self._status.lock:
            self._status.state = "draining"
            serving = self._status.serving
        if serving is not None:
            serving.engine.drain(seconds)
            serving.engine.close()

    def document(self) -> dict[str, Any]:
        """The body of GET /placement."""
        return self._status.document()

    # --- the loader thread

    def _load(self) -> None:
        try:
            serving = bring_up(self._status, self._fail, self._died)
        except Ended:
            return
        except ServiceError as error:
            self._fail(error)
        except BaseException as error:  # nobody waits for this thread: whatever it is must be seen
            log.exception("unexpected error while the deployment was brought up")
            self._fail(LoadFailed(f"unexpected {type(error).__name__} while loading; see the log"))
        else:
            self._answer(serving)

    def _answer(self, serving: Serving) -> None:
        status = self._status
        with status.lock:
            if status.state in ENDS:  # timed out or stopped meanwhile
                serving.engine.close()
                return
            status.serving = serving
            status.progress = 1.0
            status.state = "ready"
            if status.watch is not None:
                status.watch.patrol(serving.engine.inspect)
        self.on_ready(serving.model_id)

    def _fail(self, error: ServiceError) -> None:
        if not self._status.fail(error):
            return
        if self._status.drifts:  # it was proven once: a fresh process may do better
            log.error("%s", error.one_line())
            self.on_death()
        else:
            self.on_failure(error)

    # --- the engine thread, at its end

    def _died(self, error: BaseException) -> None:
        if not isinstance(error, PlacementDrifted):
            self._status.state = "failed"
            self._status.error = LoadFailed(f"the engine stopped: {type(error).__name__}")
            self.on_death()
            return
        again = drift.may_reload(self._status, error)
        if self.state == "draining":
            return
        if again:
            drift.let_go(self._status, error)
            threading.Thread(target=self._reload, name="load", daemon=True).start()
        else:
            self.on_death()

    def _reload(self) -> None:
        """Bring the same deployment up again when its model is gone and its memory free."""
        try:
            drift.clear(self._status)
        except ServiceError as error:
            self._fail(error)
        else:
            self._load()
