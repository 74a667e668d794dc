"""One deployment from its words to a model that answers: plan, load, prove, serve; and what it is
doing.

Everything runs in the worker, after the fork, in a loader thread, so that health and placement
answer meanwhile. `fallback` strategies are tried in order, each in a clean state and each proven.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any

from service.config.origin import BUILT_IN
from service.config.schema import Config
from service.config.schema import ModelConfig
from service.errors import LoadFailed
from service.errors import NotReady
from service.errors import ServiceError
from service.errors import StartupError
from service.placement import registry
from service.placement.describe import devices
from service.text.tokenizer import load_tokenizer
from service.text.tokenizer import sampling_defaults
from service.text.tokenizer import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase

    from service.engine.engine import Engine
    from service.placement.certificate import Certificate
    from service.placement.hardware import Hardware
    from service.placement.loading import Loaded
    from service.placement.plan import Placement
    from service.placement.registry import Strategy

log = logging.getLogger(__name__)

# how much of the progress is finding (and perhaps downloading) the model, and how much is loading
# it
LOCATED = 0.1
LOADED = 0.9
LOG_EVERY_S = 2.0


@dataclass(frozen=True)
class Serving:
    """A proven model that answers, and what a request needs to know of it.

    created: Unix seconds. stop_ids: tokens that end an answer. max_context: tokens of prompt and
    answer. defaults: sampling settings the model's publisher recommends, where a request gives
    none.
    """

    model_id: str
    created: int
    engine: "Engine"
    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: frozenset[int]
    max_context: int
    defaults: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """A strategy that was tried and refused."""

    strategy: str
    error: ServiceError
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "seconds": round(self.seconds, 2),
            "error": self.error.as_dict(),
        }


class _Ended(Exception):
    """The start failed or was stopped while the loader thread was busy: nothing is left to do."""


class Deployment:
    """The deployment of this process. Methods may be called from any thread.

    Whoever runs the process sets the three callbacks before `start`: on_ready gets the model's id,
    on_failure the error that ended the start, on_death is called when the engine died while
    serving.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.on_ready: Callable[[str], None] = lambda model_id: None
        self.on_failure: Callable[[ServiceError], None] = lambda error: None
        self.on_death: Callable[[], None] = lambda: None
        self.state = "planned"
        self.progress = 0.0
        self.error: ServiceError | None = None
        self._model: ModelConfig | None = None
        self._hardware: Hardware | None = None
        self._strategy: Strategy | None = None
        self._placement: Placement | None = None
        self._certificate: Certificate | None = None
        self._serving: Serving | None = None
        self._attempts: list[Attempt] = []
        self._warnings: list[str] = list(config.notices)
        self._logged_at = -LOG_EVERY_S
        self._lock = threading.Lock()

    # --- what the web room asks

    def start(self) -> None:
        """Load in the background and return at once."""
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def serving(self) -> Serving:
        """The model that answers. Raises NotReady, with state and progress in its message."""
        serving = self._serving
        if serving is None or self.state != "ready" or not serving.engine.alive:
            doing = f"{self.state} {self.progress:.0%}" if self.state == "loading" else self.state
            raise NotReady(f"The model is not ready: {doing}. Try again later.")
        return serving

    def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs finish within `seconds`, then end the rest."""
        with self._lock:
            self.state = "draining"
        if self._serving is not None:
            self._serving.engine.drain(seconds)
            self._serving.engine.close()

    def document(self) -> dict[str, Any]:
        """The body of GET /placement."""
        placement, strategy = self._placement, self._strategy
        origins = self.config.origins
        keys = type(self.config.deployment).model_fields
        document: dict[str, Any] = {
            "object": "placement",
            "schema": 1,
            "state": self.state,
            "progress": round(self.progress, 3),
            "deployment": self.config.name,
            "model": {
                "id": self._model.model_id if self._model else self.config.deployment.model,
                "parameters": placement.parameters if placement else None,
                "dtype": placement.dtype if placement else None,
                "quantize": (self._model or self.config.deployment).quantize,
                "max_context": placement.context if placement else None,
            },
            "strategy": {
                "name": strategy.name if strategy else self.config.deployment.strategy,
                "source": strategy.source if strategy else None,
            },
            "origin": {
                key: str(origin)
                for key, origin in origins.items()
                if key in keys and origin.layer != "built-in"
            },
            "kv": {
                "bytes_per_token": placement.kv_bytes_per_token if placement else None,
                "planned_tokens": placement.kv_tokens if placement else None,
                "used_tokens": self._serving.engine.stats().kv_tokens if self._serving else 0,
            },
            "devices": devices(placement, self._hardware, self._certificate),
            "certificate": self._certificate.as_dict() if self._certificate else None,
            "attempts": [attempt.as_dict() for attempt in self._attempts],
            "warnings": list(self._warnings),
        }
        if self.error is not None:
            document["error"] = self.error.as_dict()
        return document

    # --- the loader thread

    def _run(self) -> None:
        try:
            serving = self._bring_up()
        except _Ended:
            return
        except ServiceError as error:
            self._fail(error)
        except Exception as error:  # nobody waits for this thread: whatever it is must be seen
            log.exception("unexpected error while the deployment was brought up")
            self._fail(LoadFailed(f"unexpected {type(error).__name__} while loading; see the log"))
        else:
            with self._lock:
                if self.state in ("failed", "draining"):  # timed out or stopped meanwhile
                    serving.engine.close()
                    return
                self._serving = serving
                self.progress = 1.0
                self.state = "ready"
            self.on_ready(serving.model_id)

    def _enter(self, state: str) -> None:
        """Go on to the next state. Raises _Ended after the end: what timed out or is being drained
        stays so, although a hook that hung has come back.
        """
        with self._lock:
            if self.state in ("failed", "draining"):
                raise _Ended
            self.state = state

    def _fail(self, error: ServiceError) -> None:
        with self._lock:
            if self.state in ("failed", "draining"):
                return
            self.state = "failed"
            self.error = error
        self.on_failure(error)

    def _bring_up(self) -> Serving:
        """Flow 1 of docs/architecture.md. Raises StartupError."""
        chain = self._chain()  # before torch is imported: a misspelt name is told at once
        from service.models.locate import locate
        from service.placement import hardware
        from service.placement import loading

        self._enter("loading")
        model = locate(self.config, lambda stage, share: self._advance(share * LOCATED))
        self._model = model
        for position, strategy in enumerate(chain):
            machine = self._hardware = hardware.detect(model.offload_folder or self.config.cache)
            started = time.monotonic()
            before = loading.allocated_bytes()
            held: list[weakref.ref[Any]] = []
            try:
                return self._attempt(strategy, model, machine, held, first=position == 0)
            except StartupError as error:
                failure = error.bare()
            self._attempts.append(Attempt(strategy.name, failure, time.monotonic() - started))
            if position + 1 == len(chain):
                raise failure
            following = chain[position + 1].name
            log.warning("%s  Trying strategy %s.", failure.one_line(), following)
            loading.reclaim(held[0] if held else None, before)
        raise LoadFailed("no strategy was given")

    def _chain(self) -> "list[Strategy]":
        """The strategies to try, all found and their options checked before anything is loaded."""
        deployment, origins = self.config.deployment, self.config.origins
        found = registry.build(deployment.strategy_dirs)
        chain = [found.select(deployment.strategy, origins.get("strategy", BUILT_IN))]
        for name in deployment.fallback:
            chain.append(found.select(name, origins.get("fallback", BUILT_IN), "fallback"))
        for position, strategy in enumerate(chain):
            registry.settle(deployment, strategy, origins, first=position == 0)
        return chain

    def _attempt(
        self,
        strategy: "Strategy",
        model: ModelConfig,
        hardware: "Hardware",
        held: "list[weakref.ref[Any]]",
        *,
        first: bool,
    ) -> Serving:
        """Plan, load, prove and start one strategy. Raises StartupError.

        Everything that references the model is local to this call, so that it is gone when it
        raises; `held` gets a weak reference by which the caller proves that.
        """
        from service.placement import loading
        from service.placement.certificate import certify

        self._strategy, self._placement, self._certificate = strategy, None, None
        self._enter("loading")
        watchdog = threading.Timer(model.load_timeout_s, self._timed_out, [strategy, model])
        watchdog.daemon = True
        watchdog.start()
        try:
            config = registry.settle(model, strategy, self.config.origins, first=first)
            self._model = config
            placement = strategy.plan(config, hardware)
            self._placement = placement
            loaded = loading.load(
                strategy,
                config,
                placement,
                lambda share: self._advance(LOCATED + share * (LOADED - LOCATED)),
            )
            held.append(weakref.ref(loaded.model))
            self._enter("validating")
            self._advance(LOADED)
            certificate = certify(loaded)
            self._certificate = certificate
            failure = certificate.failure()
            if failure is not None:
                self._release(strategy, loaded.model)
                raise failure
            self._warnings = [*self.config.notices, *placement.notes, *loaded.notes]
            return self._serve(loaded)
        finally:
            watchdog.cancel()

    def _serve(self, loaded: "Loaded") -> Serving:
        """Start the engine, which generates one token through the real path."""
        from service.engine.engine import Engine
        from service.engine.runner import Runner

        config, model = loaded.config, loaded.model
        tokenizer = load_tokenizer(config)
        context = loaded.placement.context or config.max_context
        runner = Runner(model, loaded.strategy.place_inputs, max_context=context)
        engine = Engine(
            runner,
            max_sequences=config.max_sequences,
            max_queue=self.config.server.max_queue,
            on_death=self._died,
        )
        try:
            engine.start()
        except BaseException:
            engine.close()
            self._release(loaded.strategy, model)
            raise
        return Serving(
            config.model_id,
            int(time.time()),
            engine,
            tokenizer,
            stop_ids(model, tokenizer),
            runner.capacity,
            sampling_defaults(model),
        )

    def _release(self, strategy: "Strategy", model: "PreTrainedModel") -> None:
        """After a failure that is worth more than what `release` may raise."""
        try:
            strategy.release(model)
        except ServiceError as error:
            log.warning("%s", error.one_line())

    def _advance(self, share: float) -> None:
        """Progress only grows; every tenth is logged, but not more often than LOG_EVERY_S."""
        if share <= self.progress:
            return
        now = time.monotonic()
        if int(share * 10) > int(self.progress * 10) and now - self._logged_at >= LOG_EVERY_S:
            log.info("%s %s: %d %%", self.state, self.config.deployment.model, int(share * 100))
            self._logged_at = now
        self.progress = share

    def _timed_out(self, strategy: "Strategy", model: ModelConfig) -> None:
        """A hook that hangs cannot be stopped, only the process that it hangs in."""
        self._fail(
            LoadFailed(
                f"strategy {strategy.name} was not done within load_timeout_s: "
                f"{model.load_timeout_s:g} s (it was {self.state})",
                hint="raise load_timeout_s, or find out where the strategy hangs",
            )
        )

    def _died(self, error: BaseException) -> None:
        self.state = "failed"
        self.error = LoadFailed(f"the engine stopped: {type(error).__name__}")
        self.on_death()
