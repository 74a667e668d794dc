"""What a deployment is doing, and what is known of it so far."""

import logging
import threading
import time
from collections.abc import Iterable
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

from service.config.origin import Origin
from service.config.schema import Config
from service.config.schema import ModelConfig
from service.deployment.serving import Serving
from service.deployment.tried import Tried
from service.engine.doing import described
from service.engine.stats import EngineStats
from service.errors import ServiceError
from service.placement.describe import NOT_WATCHED
from service.placement.describe import Attempt
from service.placement.describe import asked
from service.placement.describe import certified
from service.placement.describe import devices

if TYPE_CHECKING:
    from service.placement.certificate import Certificate
    from service.placement.hardware import Hardware
    from service.placement.plan import Placement
    from service.placement.registry import Strategy
    from service.placement.watch import Watch

log = logging.getLogger(__name__)

LOG_EVERY_S = 2.0
# what is known of the engine before there is one
NOT_SERVING = described(None, None)
# after these nothing begins: a hook that hung and has come back must not undo them
ENDS = ("failed", "draining")


def activity(stats: EngineStats) -> dict[str, int]:
    """The `activity` object of GET /placement: sequences now, and tokens since the engine began."""
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.tokens,
    }


class Ended(Exception):
    """The start failed or was stopped while the loader thread was busy: nothing is left to do."""


class Status:
    """Any thread may read. The loader thread writes what it finds; `state` and `error` change
    under `lock`. origins: of every value, as the step that runs has them. broken: why entries of
    `fallback` cannot be used, drifts: why it was loaded again; a sentence each. asleep: what was
    unloaded while nobody asked, and answers again after the next request; its engine is closed.
    waking: whether somebody has asked.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.lock = threading.Lock()
        self.state = "planned"
        self.progress = 0.0
        self.error: ServiceError | None = None
        self.model: ModelConfig | None = None
        self.hardware: Hardware | None = None
        self.origins: Mapping[str, Origin] = config.origins
        self.strategy: Strategy | None = None
        self.placement: Placement | None = None
        self.certificate: Certificate | None = None
        self.serving: Serving | None = None
        self.asleep: Serving | None = None
        self.waking = False
        self.watch: Watch | None = None
        self.tried: Tried | None = None
        self.broken: list[str] = []
        self.drifts: list[str] = []
        self.attempts: list[Attempt] = []
        self.warnings: list[str] = list(config.notices)
        self._logged_at = -LOG_EVERY_S
        self._finding = ""

    def take_up(self, config: Config, keys: Iterable[str]) -> None:
        """Go on with another configuration, which differs in what needs no load. keys: those of the
        deployment's that may.
        """
        with self.lock:
            self.config = config
            if self.model is not None:
                said = {key: getattr(config.deployment, key) for key in keys}
                self.model = self.model.model_copy(update=said)

    def enter(self, state: str) -> None:
        """Go on to the next state. Raises Ended after the end."""
        with self.lock:
            if self.state in ENDS:
                raise Ended
            self.state = state

    def fail(self, error: ServiceError) -> bool:
        """End with an error. Returns False if it had ended before: then nothing changes."""
        with self.lock:
            if self.state in ENDS:
                return False
            self.state, self.error = "failed", error
            return True

    @property
    def doing(self) -> str:
        """For people: the state and the model's name, or what is done to find the model."""
        name = self.model.model_id if self.model else self.config.deployment.model
        return self._finding or f"{self.state} {name}"

    def advance(self, share: float, finding: str = "") -> None:
        """Progress only grows; every tenth is logged, but not more often than LOG_EVERY_S.

        finding: what is done to have the model's files, while that is so.
        """
        self._finding = finding
        if share <= self.progress:
            return
        now = time.monotonic()
        if int(share * 10) > int(self.progress * 10) and now - self._logged_at >= LOG_EVERY_S:
            told = (self.state, self.config.deployment.model, int(share * 100))
            log.info("%s %s: %d %%", *told, extra={"progress": share})
            self._logged_at = now
        self.progress = share

    def document(self) -> dict[str, Any]:
        """The body of GET /placement."""
        placement, serving, watch = self.placement, self.serving, self.watch
        stats = serving.engine.stats() if serving else None
        document: dict[str, Any] = {
            "object": "placement",
            "schema": 1,
            "state": self.state,
            "progress": round(self.progress, 3),
            **asked(self.config, self.model, self.strategy, placement, self.origins),
            "kv": {
                "bytes_per_token": placement.kv_bytes_per_token if placement else None,
                "planned_tokens": placement.kv_tokens if placement else None,
                "used_tokens": stats.kv_tokens if stats else 0,
            },
            "activity": activity(stats) if stats else None,
            "engine": serving.engine.describe() if serving else NOT_SERVING,
            "devices": devices(placement, self.hardware, self.certificate),
            "certificate": certified(self.certificate, watch),
            "watch": watch.as_dict() if watch else NOT_WATCHED,
            "attempts": [attempt.as_dict() for attempt in self.attempts],
            "warnings": list(self.warnings),
        }
        if self.error is not None:
            document["error"] = self.error.as_dict()
        return document
