"""A model that nobody asks is released, and loaded again for the next request."""

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

from service.deployment.serving import Serving
from service.deployment.status import ENDS
from service.deployment.status import Ended
from service.deployment.status import Status
from service.errors import NotReady
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.deployment.deployment import Deployment

log = logging.getLogger(__name__)

FAILED = (
    "The model was unloaded while nobody used it, and could not be loaded again. "
    "The next request tries again; the server's log says why it failed."
)


def unload_when_idle(deployment: "Deployment", status: Status, serving: Serving) -> None:
    """Release the model after `idle_unload_s` without a request. A thread for each model, which
    ends with it.
    """

    def seconds() -> float:
        return status.config.deployment.idle_unload_s

    while serving.uses.wait_idle(seconds):
        deployment.turn.wait("the unloading of the idle model")
        try:
            if not _answers(deployment, status):  # nor will it again: whatever follows has its own
                return
            if _close(deployment, status, serving, seconds()):
                _unload(deployment, status, serving)
        finally:
            deployment.turn.give()


def wait(deployment: "Deployment", serving: Serving, deadline: float | None) -> None:
    """A request was not let in by this model: return when there is another, having asked for it if
    nobody has. Raises NotReady by the deadline, or when the model cannot be woken.
    """
    with deployment.changed:
        status = deployment.status
        if status.asleep is not serving:
            return
        if not status.waking:
            status.waking = True
            wake = threading.Thread(target=_wake, args=(deployment, status), name="wake")
            wake.daemon = True
            wake.start()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not deployment.changed.wait_for(lambda: _settled(deployment, status), left):
            raise NotReady(
                f"The model was unloaded while nobody used it, and is not loaded yet: "
                f"{status.progress:.0%}. Try again later."
            )
        if deployment.status is not status and deployment.status.error is not None:
            raise NotReady(FAILED)


def _settled(deployment: "Deployment", status: Status) -> bool:
    """Whether there is something new to ask for since a request found `status`."""
    now = deployment.status
    return now is not status or now.state in ENDS or now.asleep is None


def _answers(deployment: "Deployment", status: Status) -> bool:
    with deployment.changed:
        return deployment.status is status and status.state == "ready"


def _close(deployment: "Deployment", status: Status, serving: Serving, seconds: float) -> bool:
    """Whether the model is idle still, and lets nobody in from now on."""
    with deployment.changed:
        if not _answers(deployment, status) or seconds <= 0:
            return False
        if not serving.uses.close_if_free(seconds):
            return False
        try:
            deployment.put(_asleep(status, serving))
        except Ended:
            return False
        return True


def _unload(deployment: "Deployment", status: Status, serving: Serving) -> None:
    try:
        deployment.let_go(status, serving)
    except ServiceError as error:
        deployment.fail(error)
    else:
        seconds = status.config.deployment.idle_unload_s
        log.info("%s is unloaded after %g s without a request", serving.model_id, seconds)


def _asleep(status: Status, serving: Serving) -> Status:
    """What is known of a deployment whose model is not loaded."""
    asleep = Status(status.config)
    asleep.state, asleep.asleep = "idle", serving
    asleep.model, asleep.strategy, asleep.origins = status.model, status.strategy, status.origins
    asleep.drifts = status.drifts
    return asleep


def _wake(deployment: "Deployment", status: Status) -> None:
    """Load and prove what was unloaded."""
    deployment.turn.wait("waking the idle model")
    began = time.monotonic()
    asleep = status.asleep
    try:
        if asleep is None or deployment.status is not status:  # a reload came first
            return
        serving = deployment.bring_up(status, deployment.fail)
        deployment.answer(status, serving)
        log.info("%s is loaded again after %.1f s", serving.model_id, time.monotonic() - began)
    except Ended:
        return
    except ServiceError as error:
        log.error("the idle model cannot be loaded: %s", error.one_line())
        if asleep is not None:
            again = _asleep(status, asleep)
            again.error, again.attempts = error.bare(), status.attempts
            with contextlib.suppress(Ended):
                deployment.put(again)
    finally:
        deployment.turn.give()
