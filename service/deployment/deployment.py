"""What the web room and the process ask of a deployment, and the thread that brings it up.

Everything runs in the worker, after the fork, in a loader thread, so that health and placement
answer meanwhile.
"""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from service.config.schema import Config
from service.deployment import control
from service.deployment import drift
from service.deployment import idle
from service.deployment.attempt import bring_up
from service.deployment.serving import Serving
from service.deployment.status import ENDS
from service.deployment.status import Ended
from service.deployment.status import Status
from service.deployment.turn import Turn
from service.errors import LoadFailed
from service.errors import NotReady
from service.errors import PlacementDrifted
from service.errors import ServiceError

log = logging.getLogger(__name__)

# what reading a request may take before it has a deadline in the engine
MOST_BODY_S = 60.0


class Deployment:
    """The deployment of this process. Methods may be called from any thread.

    Whoever runs the process sets the callbacks before `start`: on_ready gets the model's id,
    on_failure the error that ended the start, on_death is called when the engine died, or its
    model changed, while serving, on_reload gets the configuration that a reload has proven.

    status, turn, changed and the methods below the line are for this room: `reload` and `idle`.
    """

    def __init__(self, config: Config) -> None:
        self.on_ready: Callable[[str], None] = lambda model_id: None
        self.on_failure: Callable[[ServiceError], None] = lambda error: None
        self.on_death: Callable[[], None] = lambda: None
        self.on_reload: Callable[[Config], None] = lambda config: None
        self.status = Status(config)
        self.turn = Turn()
        # Guards what `status` and the two below refer to; notified when a model answers or the
        # attempt to have one has failed.
        self.changed = threading.Condition()
        self._beside: Status | None = None
        self._leaving: list[Serving] = []
        self._served = False

    @property
    def config(self) -> Config:
        """What it runs with now: a reload changes it."""
        return self.status.config

    @property
    def state(self) -> str:
        """planned, loading, validating, ready, idle, degraded, draining or failed."""
        return self.status.state

    @property
    def progress(self) -> float:
        """Of the load, 0..1."""
        return self.status.progress

    @property
    def doing(self) -> str:
        """What the load is at, for people: "loading smollm2-135m"."""
        return self.status.doing

    @property
    def error(self) -> ServiceError | None:
        """What ended the start or the serving."""
        return self.status.error

    @property
    def embeds(self) -> bool:
        """Whether the model that answers gives embeddings, and no text."""
        serving = self.status.serving
        return serving is not None and serving.embeddings is not None

    def start(self) -> None:
        """Load in the background and return at once."""
        self.turn.take("the first load")
        threading.Thread(target=self._load, name="load", daemon=True).start()

    @property
    def loading_share(self) -> float:
        """Of the load that is under way, 0..1; of a model beside the one that answers, if any."""
        beside = self._beside
        return self.progress if beside is None else beside.progress

    def obey(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What came in on the control socket, and what is told of it; see `control.obey`."""
        return control.obey(self, request)

    def serving(self) -> Serving:
        """The model that answers; who asks it something takes it from `use`. While idle, and while
        it wakes, what it was and will be: its engine is closed.

        Raises NotReady, with state and progress in its message, or PlacementDrifted, with what
        changed.
        """
        status = self.status
        if status.asleep is not None and status.state not in ENDS:
            return status.asleep
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

    def use(self, deadline: float | None = None) -> Serving:
        """The model that answers, for one request, which calls `uses.leave()` of it at its end.

        A model that is asleep is woken and waited for. deadline: `time.monotonic`. Raises what
        `serving` raises, and NotReady when it was not woken by the deadline, or cannot be.
        """
        while True:
            serving = self.serving()
            if serving.uses.enter():
                return serving
            idle.wait(self, serving, deadline)

    def probed(self) -> Serving:
        """`serving`, for a readiness probe: looks first whether the model has changed.

        Raises NotReady, too, while its engine hangs: who asks it something now waits in vain.
        """
        watch = self.status.watch
        if watch is not None and self.state == "ready":
            watch.probe()
        serving = self.serving()
        if hangs := serving.engine.hangs():
            hint = "start the server again if this does not end"
            raise NotReady(f"The model is not ready: {hangs}.", hint=hint)
        return serving

    def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs finish within `seconds`, then end the rest."""
        until = time.monotonic() + seconds
        with self.changed:
            ending = [self.status] if self._beside is None else [self.status, self._beside]
            for status in ending:
                with status.lock:
                    status.state = "draining"
            serving = self.status.serving
            leaving = [] if serving is None else [serving]
            leaving += [one for one in self._leaving if one is not serving]
            self.changed.notify_all()
        for one in leaving:
            one.engine.drain(max(0.0, until - time.monotonic()))
        for one in leaving:
            one.engine.close()
            one.uses.close()  # whoever watches whether it is idle has nothing to wait for

    def document(self) -> dict[str, Any]:
        """The body of GET /placement."""
        return self.status.document()

    # --- the thread that loads, reloads, unloads or wakes; it has the turn

    def bring_up(self, status: Status, fail: Callable[[ServiceError], None]) -> Serving:
        """A proven model for this status; see `attempt.bring_up`. Raises Ended or ServiceError."""
        try:
            return bring_up(status, fail, lambda error: self._died(status, error))
        except (Ended, ServiceError):
            raise
        except BaseException as error:  # nobody waits for this thread: whatever it is must be seen
            log.exception("unexpected error while the deployment was brought up")
            found = f"unexpected {type(error).__name__} while loading; see the log"
            raise LoadFailed(found) from None

    def load_beside(self, status: Status | None) -> None:
        """What is loaded beside the model that answers: a drain ends it, too. Raises Ended."""
        with self.changed:
            if status is not None and self.status.state in ENDS:
                raise Ended
            self._beside = status

    def put(self, status: Status) -> None:
        """Put this status in place of what is there. Raises Ended after the end."""
        with self.changed:
            with self.status.lock:
                if self.status.state in ENDS:
                    raise Ended
            self.status = status
            self.changed.notify_all()

    def answer(self, status: Status, serving: Serving) -> None:
        """From now on this model answers, in place of what is there. Closes it and raises Ended
        after the end: it was timed out or stopped meanwhile.
        """
        with self.changed, status.lock:
            if status.state in ENDS or self.status.state in ENDS:
                serving.engine.close()
                raise Ended
            if not serving.engine.alive:
                raise LoadFailed("the engine stopped before it had served")
            status.serving, status.asleep, status.error = serving, None, None
            status.progress = 1.0
            status.state = "ready"
            if status.watch is not None:
                status.watch.patrol(serving.engine.inspect)
            self.status, self._beside, self._served = status, None, True
            status.waking = False
            self.changed.notify_all()
        watch = (self, status, serving)
        threading.Thread(target=idle.unload_when_idle, args=watch, name="idle", daemon=True).start()

    def let_go(self, status: Status, serving: Serving) -> None:
        """Release a model that no request is at work with. Raises LoadFailed (F21) if the model,
        or its memory, is not given back.
        """
        if status.watch is not None:
            status.watch.close()
        tried = status.tried
        if tried is not None:
            tried.expect_back()
            tried.release()
        with status.lock:
            status.serving = None
        serving.engine.close()
        if tried is not None:
            tried.reclaim()

    def finish(self, serving: Serving) -> None:
        """Wait for the requests that are at work with a model that takes no more. Each has its
        deadline, and a body may take its time before.
        """
        with self.changed:
            self._leaving.append(serving)
        serving.uses.close()
        server = self.config.server
        if not serving.uses.wait_free(server.request_timeout_s + MOST_BODY_S):
            log.error("%d requests outlived their deadline; they are ended", serving.uses.count)
        serving.engine.drain(0.0)
        with self.changed:
            self._leaving.remove(serving)

    def fail(self, error: ServiceError) -> None:
        """The model cannot be served any more, or at all: end this process."""
        with self.changed:
            status, served = self.status, self._served
            failed = status.fail(error)
            self.changed.notify_all()
        if not failed:
            return
        if served:  # it was proven once: a fresh process may do better
            log.error("%s", error.one_line())
            self.on_death()
        else:
            self.on_failure(error)

    def _load(self) -> None:
        try:
            serving = self.bring_up(self.status, self.fail)
            self.answer(self.status, serving)
        except Ended:
            return
        except ServiceError as error:
            self.fail(error)
            return
        finally:
            self.turn.give()
        self.on_ready(serving.model_id)

    # --- the engine thread, at its end

    def _died(self, status: Status, error: BaseException) -> None:
        with self.changed:
            served = status is self.status
        if not served:  # it was replaced, or is not there yet: `answer` looks
            log.error("the engine of a model that does not serve stopped: %s", error)
            return
        if not isinstance(error, PlacementDrifted):
            status.state = "failed"
            status.error = LoadFailed(f"the engine stopped: {type(error).__name__}")
            self.on_death()
            return
        again = drift.may_reload(status, error)
        if self.state == "draining":
            return
        if again and self.turn.try_take("a load after the model changed"):
            drift.let_go(status, error)
            threading.Thread(target=self._reload, name="load", daemon=True).start()
        else:
            self.on_death()

    def _reload(self) -> None:
        """Bring the same deployment up again when its model is gone and its memory free."""
        try:
            drift.clear(self.status)
        except ServiceError as error:
            self.turn.give()
            self.fail(error)
        else:
            self._load()
