"""One deployment, from its words to a model that answers, and its state.

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
from service.errors import PlacementDrifted
from service.errors import ServiceError
from service.errors import StartupError
from service.placement import registry
from service.placement.describe import NOT_WATCHED
from service.placement.describe import Attempt
from service.placement.describe import asked
from service.placement.describe import devices
from service.placement.describe import plan_warnings
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
    from service.placement.watch import Watch

log = logging.getLogger(__name__)

# how much of the progress is finding (and perhaps downloading) the model, and how much is loading
# it
LOCATED = 0.1
LOADED = 0.9
LOG_EVERY_S = 2.0
# a model that changes again and again is changed by something that a reload does not cure
MOST_RELOADS = 3


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


class _Ended(Exception):
    """The start failed or was stopped while the loader thread was busy: nothing is left to do."""


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
        self.state = "planned"
        self.progress = 0.0
        self.error: ServiceError | None = None
        self._model: ModelConfig | None = None
        self._hardware: Hardware | None = None
        self._strategy: Strategy | None = None
        self._placement: Placement | None = None
        self._certificate: Certificate | None = None
        self._serving: Serving | None = None
        self._watch: Watch | None = None
        # what to give back before a reload: whose model, the model, bytes allocated before it
        self._tried: tuple[Strategy, list[weakref.ref[Any]], dict[str, int]] | None = None
        self._drifts: list[str] = []  # one sentence for each reload
        self._attempts: list[Attempt] = []
        self._warnings: list[str] = list(config.notices)
        self._logged_at = -LOG_EVERY_S
        self._lock = threading.Lock()

    # --- what the web room asks

    def start(self) -> None:
        """Load in the background and return at once."""
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def serving(self) -> Serving:
        """The model that answers. Raises NotReady, with state and progress in its message, or
        PlacementDrifted, with what changed.
        """
        serving = self._serving
        drift = self._watch.error() if self._watch and self.state == "degraded" else None
        if drift is not None:
            raise drift
        if serving is None or self.state != "ready" or not serving.engine.alive:
            doing = f"{self.state} {self.progress:.0%}" if self.state == "loading" else self.state
            raise NotReady(f"The model is not ready: {doing}. Try again later.")
        return serving

    def probed(self) -> Serving:
        """`serving`, for a readiness probe: looks first whether the model has changed."""
        if self._watch is not None and self.state == "ready":
            self._watch.probe()
        return self.serving()

    def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs finish within `seconds`, then end the rest."""
        with self._lock:
            self.state = "draining"
            serving = self._serving
        if serving is not None:
            serving.engine.drain(seconds)
            serving.engine.close()

    def document(self) -> dict[str, Any]:
        """The body of GET /placement."""
        placement, strategy = self._placement, self._strategy
        serving, watch = self._serving, self._watch
        document: dict[str, Any] = {
            "object": "placement",
            "schema": 1,
            "state": self.state,
            "progress": round(self.progress, 3),
            **asked(self.config, self._model, strategy, placement),
            "kv": {
                "bytes_per_token": placement.kv_bytes_per_token if placement else None,
                "planned_tokens": placement.kv_tokens if placement else None,
                "used_tokens": serving.engine.stats().kv_tokens if serving else 0,
            },
            "devices": devices(placement, self._hardware, self._certificate),
            "certificate": self._certificate.as_dict() if self._certificate else None,
            "watch": watch.as_dict() if watch else NOT_WATCHED,
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
                if self._watch is not None:
                    self._watch.patrol(serving.engine.inspect)
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
        if self._drifts:  # it was proven once: a fresh process may do better
            log.error("%s", error.one_line())
            self.on_death()
        else:
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
            self._tried = (strategy, held, before)
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
            off = plan_warnings(placement, certificate.plan_errors)
            notes = [*self.config.notices, *placement.notes, *loaded.notes]
            self._warnings = [*notes, *off, *self._drifts]
            return self._serve(loaded)
        finally:
            watchdog.cancel()

    def _serve(self, loaded: "Loaded") -> Serving:
        """Start the engine, which generates one token through the real path."""
        from service.engine.engine import Engine
        from service.engine.runner import Runner
        from service.placement.watch import Watch

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
            if config.watch_interval_s > 0:
                self._watch = Watch(model, config.watch_interval_s)
                engine.look_with(self._look)
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

    def _look(self, thorough: bool) -> PlacementDrifted | None:
        """Look whether the model has changed, between two steps. Engine thread."""
        watch = self._watch
        drift = watch.look(thorough) if watch is not None else None
        if watch is not None and drift is not None:
            with self._lock:  # before the streams end, so that no new one begins
                if self.state == "ready":
                    self.state, self.error = "degraded", watch.error()
        return drift

    def _drifted(self, error: PlacementDrifted) -> None:
        """Do as `on_drift` says; every stream has been told. Engine thread."""
        log.error("%s", error.one_line())
        policy = (self._model or self.config.deployment).on_drift
        if self._watch is not None:
            self._watch.close()
        if self.state == "draining":
            return
        if policy == "stop" or self._tried is None or len(self._drifts) >= MOST_RELOADS:
            self.on_death()
            return
        self._drifts.append(f"loaded again: {error.message}")
        strategy, held, before = self._tried
        model = held[0]()
        if model is not None:  # the runner lets go of it only when this thread ends
            self._release(strategy, model)
        reload = threading.Thread(target=self._reload, args=(held[0], before), name="load")
        reload.daemon = True
        reload.start()

    def _reload(self, model: "weakref.ref[Any]", before: dict[str, int]) -> None:
        """Bring the same deployment up again when its model is gone and its memory free."""
        from service.placement import loading

        with self._lock:
            serving, self._serving = self._serving, None
            self._attempts, self.progress = [], 0.0
        if serving is not None:
            serving.engine.close()
        try:
            loading.reclaim(model, before)
        except ServiceError as error:
            self._fail(error)
            return
        with self._lock:
            if self.state != "draining":
                self.error = None
        self._run()

    def _died(self, error: BaseException) -> None:
        if isinstance(error, PlacementDrifted):
            self._drifted(error)
            return
        self.state = "failed"
        self.error = LoadFailed(f"the engine stopped: {type(error).__name__}")
        self.on_death()
