"""`moorage reload`: the configuration as it is now, without dropping a request.

The new model is planned beside the old one, on what is free now. Where it fits it is loaded, proven
and started while the old one answers; then new requests get the new one, running ones finish on the
old one, and that is released. Where it does not, but would on what the old one frees, the old one
takes no more requests, finishes what runs and is released first; if the new one then fails, the old
one is loaded and proven again. What cannot fit is refused while the old one serves.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Any

from service.config.origin import BUILT_IN
from service.config.schema import Config
from service.deployment.serving import Serving
from service.deployment.status import Ended
from service.deployment.status import Status
from service.errors import ConfigError
from service.errors import ControlFailed
from service.errors import DoesNotFit
from service.errors import LoadFailed
from service.errors import Problem
from service.errors import ServiceError
from service.errors import StartupError

if TYPE_CHECKING:
    from service.deployment.deployment import Deployment
    from service.placement.hardware import Hardware

log = logging.getLogger(__name__)

# keys of the server block that the running server looks up; all others need a restart
LIVE = frozenset({"key_limits", "max_body", "max_queue"})
# keys of a deployment that change nothing about its model
WITHOUT_LOAD = frozenset({"idle_unload_s", "load_timeout_s", "on_drift"})
STOPPING = "the server is stopping"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a reload did.

    way: "unchanged", "settings" (nothing was loaded), "beside" or "drained". changed: the keys that
    differ. warnings: what went wrong after the new model answered.
    """

    way: str
    deployment: str
    model: str
    changed: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "deployment": self.deployment,
            "model": self.model,
            "changed": list(self.changed),
            "seconds": round(self.seconds, 2),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Wish:
    """drain: let the old model go first (True), never (False), or only where it must be (None).
    force: load again although no word has changed: the files may have.
    """

    drain: bool | None = None
    force: bool = False


def reload(
    deployment: "Deployment",
    read: Callable[[], Config],
    wish: Wish,
    tell: Tell,
    hangs: Callable[[ServiceError], None],
) -> Outcome:
    """Change to the configuration that `read` returns. It has the turn, and gives it back.

    tell: gets what is being done, a clause each. hangs: called from another thread when a hook of
    the new model's strategy is not done in time; then this may never return, and the old model
    serves. Raises StartupError: what was refused, or failed; its message says what serves now.
    """
    began = time.monotonic()
    try:
        return _reload(deployment, read(), wish, tell, hangs, began)
    except Ended:
        raise ControlFailed(f"{STOPPING}; the reload was not done") from None
    except ServiceError as error:
        log.error("reload: %s", error.one_line())
        raise
    finally:
        deployment.load_beside(None)
        deployment.turn.give()


def _reload(
    deployment: "Deployment",
    new: Config,
    wish: Wish,
    tell: Tell,
    hangs: Callable[[ServiceError], None],
    began: float,
) -> Outcome:
    old = deployment.status
    if old.state not in ("ready", "idle"):
        raise ControlFailed(
            f"the model cannot be reloaded while the server is {old.state}",
            hint="GET /placement says why",
        )
    _refuse_restart(old.config, new)
    changed = _changed(old.config, new)
    loads = wish.force or any(not key.startswith("server.") for key in changed - WITHOUT_LOAD)
    warnings: tuple[str, ...] = ()
    if loads:
        way, warnings = _load(deployment, old, new, wish, tell, hangs)
    else:
        way = "settings" if changed else "unchanged"
        old.take_up(new, WITHOUT_LOAD)
    now = deployment.status
    serving = now.serving or now.asleep
    if serving is not None:
        serving.uses.look_again()
        serving.engine.allow_queue(new.server.max_queue)
    model = new.deployment.model if serving is None else serving.model_id
    deployment.on_reload(new)
    seconds = time.monotonic() - began
    outcome = Outcome(way, new.name, model, tuple(sorted(changed)), seconds, warnings)
    log.info("reloaded (%s): %s, %s, in %.1f s", way, new.name, model, seconds)
    return outcome


def _load(
    deployment: "Deployment",
    old: Status,
    new: Config,
    wish: Wish,
    tell: Tell,
    hangs: Callable[[ServiceError], None],
) -> tuple[str, tuple[str, ...]]:
    """Have the new model answer. Returns the way, and warnings."""
    tell(f"planning {new.name}")
    beside = _fits_beside(old, new, wish)
    candidate = Status(new)
    serving = old.serving
    if beside or serving is None:
        tell(f"loading {new.deployment.model}")
        deployment.load_beside(candidate)

        def late(error: ServiceError) -> None:
            if candidate.fail(error):
                hangs(error)

        try:
            deployment.answer(candidate, deployment.bring_up(candidate, late))
        except StartupError as error:
            _clear(candidate)
            if deployment.state == "degraded":  # it changed meanwhile, and nothing replaces it
                deployment.on_death()
            raise _explained(error, "the old model serves on") from None
        if serving is None:
            return "beside", ()
        tell(f"the new model answers; {serving.uses.count} requests finish on the old one")
        deployment.finish(serving)
        try:
            deployment.let_go(old, serving)
        except LoadFailed as error:
            log.error("the old model: %s", error.one_line())
            return "beside", (f"the old model is not given back: {error.message}",)
        return "beside", ()
    _drained(deployment, old, serving, candidate, tell)
    return "drained", ()


def _drained(
    deployment: "Deployment", old: Status, serving: Serving, candidate: Status, tell: Tell
) -> None:
    """Let the old model go, then load the new one, or the old one again."""
    tell(f"taking no requests; {serving.uses.count} finish on the old model")
    candidate.state = "loading"
    deployment.put(candidate)
    deployment.finish(serving)
    try:
        deployment.let_go(old, serving)
    except ServiceError as error:
        deployment.fail(error)
        raise _explained(error, "a fresh process loads the old model") from None
    tell(f"loading {candidate.config.deployment.model}")
    try:
        deployment.answer(candidate, deployment.bring_up(candidate, deployment.fail))
    except StartupError as error:
        log.error("the new model cannot be served: %s  Loading the old one.", error.one_line())
        failure = error.bare()
    else:
        return
    _clear(candidate)
    tell("that failed; loading the old model again")
    back = Status(old.config)
    back.drifts.append(f"a reload failed: {failure.message}")
    deployment.put(back)
    try:
        deployment.answer(back, deployment.bring_up(back, deployment.fail))
    except ServiceError as error:
        deployment.fail(error)
        raise _explained(
            failure, f"the old model cannot be loaded either: {error.one_line()}"
        ) from None
    raise _explained(failure, "the old model was loaded again and serves")


def _clear(candidate: Status) -> None:
    """Give back what a model that failed took. What stays behind is told in the log."""
    try:
        if candidate.tried is not None and candidate.tried.before:
            candidate.tried.reclaim()
    except LoadFailed as error:
        log.error("the new model: %s", error.one_line())


def _fits_beside(old: Status, new: Config, wish: Wish) -> bool:
    """Whether the first step of the chain that can be planned at all fits beside the old model.

    Raises StartupError where none fits, or the model's files are missing.
    """
    from service.models.locate import locate
    from service.placement import hardware
    from service.placement.chain import outlook
    from service.placement.chain import steps

    try:
        _, chain = steps(new)
        model = locate(new, lambda stage, share: None)
    except StartupError as error:
        raise _explained(error, "the old model serves on") from None
    machine = hardware.detect(model.offload_folder or new.cache)
    now = outlook(chain, model, machine)
    if wish.drain is False or old.serving is None:
        later = now
    else:
        later = outlook(chain, model, _freed(machine, old))
    first = next((at for at, found in enumerate(later) if found.placement is not None), None)
    if first is None:
        failure = later[-1].error or DoesNotFit("no step of the chain can be planned")
        serves = "the old model serves on"
        if wish.drain is False and isinstance(failure, DoesNotFit):
            serves += ", and takes room that --drain would free"
        raise _explained(failure, serves)
    return now[first].placement is not None and wish.drain is not True


def _freed(machine: "Hardware", old: Status) -> "Hardware":
    """The machine as it will be without the old model: what its load took, and its KV cache."""
    freed = dict(old.tried.took) if old.tried is not None else {}
    serving = old.serving
    reserved = {} if serving is None else serving.engine.describe()["kv_reserved"]
    if isinstance(reserved, Mapping):
        for device, size in reserved.items():
            freed[device] = freed.get(device, 0) + size
    gpus = tuple(
        replace(gpu, free_bytes=gpu.free_bytes + max(0, freed.get(gpu.id, 0)))
        for gpu in machine.gpus
    )
    cpu = replace(machine.cpu, free_bytes=machine.cpu.free_bytes + max(0, freed.get("cpu", 0)))
    return replace(machine, gpus=gpus, cpu=cpu)


def _changed(old: Config, new: Config) -> frozenset[str]:
    """The keys whose values differ; "deployment" when it is another block."""
    server = type(new.server).model_fields
    keys = {f"server.{key}" for key in server if _differs(old.server, new.server, key)}
    keys |= {
        key
        for key in type(new.deployment).model_fields
        if _differs(old.deployment, new.deployment, key)
    }
    if old.name != new.name:
        keys.add("deployment")
    return frozenset(keys)


def _differs(old: object, new: object, key: str) -> bool:
    return bool(getattr(old, key) != getattr(new, key))


def _refuse_restart(old: Config, new: Config) -> None:
    """Raise ConfigError for every key that only a restart can change."""
    keys = [
        f"server.{key}"
        for key in type(new.server).model_fields
        if key not in LIVE and _differs(old.server, new.server, key)
    ]
    problems = [
        Problem(origin.where(), key, "has changed, which needs a restart", origin.source)
        for key in keys
        for origin in (new.origins.get(key, BUILT_IN),)
    ]
    if problems:
        raise ConfigError(problems, hint="restart the server, or put it back as it was")


def _explained(error: ServiceError, serves: str) -> ServiceError:
    """The same error, its message ending with what serves now."""
    found = error.bare()
    found.message = f"{error.message.rstrip('.')}. Now {serves}"
    found.args = (found.message,)
    return found
