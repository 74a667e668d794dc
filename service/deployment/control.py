"""What the control socket may ask of a deployment: one request, and what is told of it."""

import queue
import threading
from collections.abc import Iterator
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

from service.config import reading
from service.config.schema import Config
from service.deployment.reload import Outcome
from service.deployment.reload import Wish
from service.deployment.reload import reload
from service.errors import ControlFailed
from service.errors import LoadFailed
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.deployment.deployment import Deployment

Message = dict[str, Any]

# how often somebody who waits is told how far the load is
TOLD_EVERY_S = 1.0
KEYS = {"command", "deployment", "drain", "force", "wait"}


def obey(deployment: "Deployment", request: Mapping[str, Any]) -> Iterator[Message]:
    """Do what a request says, and tell of it: {"progress": ...} any number of times, then
    {"result": ...} or {"error": ..., "exit_status": ...}. What was begun is finished even if nobody
    reads on.

    request: {"command": "reload"}, and of "deployment" (a name or null), "drain" (true, false or
    null), "force" and "wait" (true or false) what is not as in `Wish`; wait: false only begins.
    """
    try:
        name, wish, waits = _read(request)
        deployment.turn.take("a reload")
    except ServiceError as error:
        yield _told(error)
        return
    told: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def read() -> Config:
        return reading.again(deployment.config, name)

    def run() -> None:
        try:
            outcome: Outcome = reload(
                deployment,
                read,
                wish,
                lambda doing: told.put({"progress": {"doing": doing}}),
                lambda error: told.put(_told(error)),
            )
        except ServiceError as error:
            told.put(_told(error))
        except BaseException as error:  # it must reach who waits, and the log
            told.put(_told(LoadFailed(f"unexpected {type(error).__name__} in the reload")))
            raise
        else:
            told.put({"result": outcome.as_dict()})

    threading.Thread(target=run, name="reload", daemon=True).start()
    if not waits:
        yield {"result": {"way": "begun"}}
        return
    while True:
        try:
            message = told.get(timeout=TOLD_EVERY_S)
        except queue.Empty:
            message = {"progress": {"share": round(deployment.loading_share, 3)}}
        yield message
        if "progress" not in message:
            return


def _read(request: Mapping[str, Any]) -> tuple[str | None, Wish, bool]:
    """Raises ControlFailed for what is not a reload as `obey` describes it."""
    drain, force = request.get("drain"), request.get("force", False)
    name, waits = request.get("deployment"), request.get("wait", True)
    right = (
        request.get("command") == "reload"
        and request.keys() <= KEYS
        and (name is None or isinstance(name, str))
        and (drain is None or isinstance(drain, bool))
        and isinstance(force, bool)
        and isinstance(waits, bool)
    )
    if not right:
        raise ControlFailed("the request is none that this server knows; is it another version?")
    return name, Wish(drain, force), waits


def _told(error: ServiceError) -> Message:
    return {"error": error.as_dict(), "exit_status": error.exit_status or 1}
