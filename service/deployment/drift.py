"""A model that changes while it serves: noticed, told, and by config loaded again."""

import logging
from typing import TYPE_CHECKING

from service.deployment.serving import Serving
from service.deployment.status import Status
from service.errors import PlacementDrifted

if TYPE_CHECKING:
    from service.placement.loading import Loaded

log = logging.getLogger(__name__)

# a model that changes again and again is changed by something that a reload does not cure
MOST_RELOADS = 3


def watch(status: Status, loaded: "Loaded", serving: Serving) -> None:
    """Take the fingerprint, and have the engine compare it. After its start, before requests."""
    from service.placement.watch import Watch

    if loaded.config.watch_interval_s > 0:
        status.watch = Watch(loaded.model, loaded.config.watch_interval_s)
        serving.engine.look_with(lambda thorough: look(status, thorough))


def look(status: Status, thorough: bool) -> PlacementDrifted | None:
    """Look whether the model has changed, between two steps. Engine thread."""
    watch = status.watch
    drift = watch.look(thorough) if watch is not None else None
    if watch is not None and drift is not None:
        with status.lock:  # before the streams end, so that no new one begins
            if status.state == "ready":
                status.state, status.error = "degraded", watch.error()
    return drift


def may_reload(status: Status, error: PlacementDrifted) -> bool:
    """Whether the model that changed is to be loaded again: as `on_drift` says, and unless that has
    not helped before. Every stream has been told. Engine thread.
    """
    log.error("%s", error.one_line())
    if status.watch is not None:
        status.watch.close()
    policy = (status.model or status.config.deployment).on_drift
    return policy == "reload" and status.tried is not None and len(status.drifts) < MOST_RELOADS


def let_go(status: Status, error: PlacementDrifted) -> None:
    """Note why it is loaded again, and let the strategy release what it loaded. Engine thread."""
    status.drifts.append(f"loaded again: {error.message}")
    if status.tried is not None:
        status.tried.release()  # the runner lets go of the model only when this thread ends


def clear(status: Status) -> None:
    """Make room for a second load. Raises LoadFailed if the model, or its memory, is not gone."""
    with status.lock:
        serving, status.serving = status.serving, None
        status.attempts, status.progress = [], 0.0
    if serving is not None:
        serving.engine.close()
    if status.tried is not None:
        status.tried.reclaim()
    with status.lock:
        if status.state != "draining":
            status.error = None
