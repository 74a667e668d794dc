"""From a chain of strategies to one that is proven and answers. Loader thread."""

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.config.schema import ModelConfig
from service.deployment import drift
from service.deployment.serving import Serving
from service.deployment.serving import serve
from service.deployment.status import Status
from service.deployment.tried import Tried
from service.errors import LoadFailed
from service.errors import ServiceError
from service.errors import StartupError
from service.placement.chain import steps
from service.placement.describe import Attempt
from service.placement.describe import plan_warnings

if TYPE_CHECKING:
    from service.placement.loading import Loaded

log = logging.getLogger(__name__)

# how much of the progress is finding (and perhaps downloading) the model, and how much is loading
# it
LOCATED = 0.1
LOADED = 0.9
# checks of the certificate that call a hook of the strategy: what failed is that hook
HOOKS_OF_CHECKS = {"strategy": "validate", "inputs": "place_inputs"}

Fail = Callable[[ServiceError], None]
Died = Callable[[BaseException], None]


def bring_up(status: Status, fail: Fail, died: Died) -> Serving:
    """Flow 1 of docs/architecture.md: each step of the chain in a clean state, each proven.

    fail: called from another thread when a step takes too long. died: the engine's `on_death`.
    Raises StartupError.
    """
    config = status.config
    _, chain = steps(config)  # before torch is imported: a misspelt name is told at once
    status.enter("loading")
    status.broken = [f"cannot fall back: {step.fault.message}" for step in chain[1:] if step.fault]
    model = None
    if any(step.fault is None for step in chain):
        from service.models.locate import locate

        model = locate(config, lambda stage, share: status.advance(share * LOCATED, stage))
        status.advance(LOCATED)
    for position, step in enumerate(chain, 1):
        words = (model or config.deployment).model_copy(
            update={"strategy": step.name, **step.changes}
        )
        tried = status.tried = Tried(step, words, step.stage)
        started = time.monotonic()
        try:
            return _guarded(status, model, tried, fail, died)
        except StartupError as error:
            failure = error.bare()
        seconds = time.monotonic() - started
        status.attempts.append(Attempt(tried.words, tried.stage, failure, seconds))
        if position == len(chain):
            raise failure
        told = (step, tried.stage, failure.one_line(), chain[position])
        log.warning("%s failed (%s): %s  Trying %s.", *told)
        tried.reclaim()
    raise LoadFailed("no strategy was given")


def _guarded(
    status: Status, model: ModelConfig | None, tried: Tried, fail: Fail, died: Died
) -> Serving:
    """One attempt under a watchdog. model: None if no step can be used. Raises StartupError."""
    step = tried.step
    status.origins, status.strategy = step.origins, step.found
    status.placement = status.certificate = status.hardware = status.watch = None
    if model is None or step.fault is not None:
        raise step.fault or LoadFailed("there is no model")
    watchdog = threading.Timer(model.load_timeout_s, lambda: fail(_too_slow(tried)))
    watchdog.daemon = True
    watchdog.start()
    try:
        return _attempt(status, model, tried, died)
    finally:
        watchdog.cancel()


def _attempt(status: Status, model: ModelConfig, tried: Tried, died: Died) -> Serving:
    """Plan, load, prove and start one strategy. Raises StartupError.

    Everything that references the model is local to this call, so that it is gone when it raises;
    `tried` gets a weak reference by which the caller proves that.
    """
    from service.placement import hardware
    from service.placement import loading

    strategy = tried.step.strategy
    status.enter("loading")
    tried.before, tried.stage = loading.allocated_bytes(), "plan"
    config = tried.words = status.model = tried.step.settle(model)
    status.hardware = hardware.detect(config.offload_folder or status.config.cache)
    placement = status.placement = strategy.plan(config, status.hardware)
    tried.stage = "load"
    loaded = loading.load(
        strategy,
        config,
        placement,
        lambda share: status.advance(LOCATED + share * (LOADED - LOCATED)),
    )
    tried.model = weakref.ref(loaded.model)
    after = loading.allocated_bytes()
    tried.took = {device: size - tried.before.get(device, 0) for device, size in after.items()}
    try:
        _prove(status, tried, loaded)
        tried.stage = "start"
        return _start(status, loaded, died)
    except BaseException:
        tried.release()
        raise


def _prove(status: Status, tried: Tried, loaded: "Loaded") -> None:
    """Certify. Raises PlacementMismatch, or what a hook of the strategy raised."""
    from service.placement.certificate import certify

    tried.stage = "certificate"
    status.enter("validating")
    status.advance(LOADED)
    certificate = status.certificate = certify(loaded)
    for check in certificate.checks:
        if check.error is not None:
            tried.stage = HOOKS_OF_CHECKS.get(check.name, "certificate")
            raise check.error
    if certificate.seconds > certificate.budget_seconds:
        log.warning("the certificate took %.1f s: more than it may", certificate.seconds)
    placement = loaded.placement
    off = plan_warnings(placement, certificate.plan_errors)
    notes = [*status.config.notices, *status.broken, *placement.notes, *loaded.notes]
    status.warnings = [*notes, *off, *status.drifts]


def _start(status: Status, loaded: "Loaded", died: Died) -> Serving:
    """Let it answer, and watch it."""
    serving = serve(loaded, max_queue=status.config.server.max_queue, on_death=died)
    try:
        drift.watch(status, loaded, serving)
    except BaseException:
        serving.engine.close()
        raise
    return serving


def _too_slow(tried: Tried) -> LoadFailed:
    """A hook that hangs cannot be stopped, only the process that it hangs in."""
    return LoadFailed(
        f"strategy {tried.step.name} was not done within load_timeout_s: "
        f"{tried.words.load_timeout_s:g} s (in its {tried.stage})",
        hint="raise load_timeout_s, or find out where the strategy hangs",
    )
