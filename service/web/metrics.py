"""GET /metrics: the deployment in Prometheus' text format, read when it is asked for.

What vLLM has too has its name and labels, under the prefix of `server.metrics_prefix`; what it
does not have (state, placement, proof, watch) is always `moorage:`.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from flask import Flask
from flask import Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from service.deployment import Deployment
from service.errors import NotReady
from service.errors import PlacementDrifted
from service.web import routes
from service.web.latency import ENGINE
from service.web.latency import LABELS
from service.web.routes import Operation

STATES = ("planned", "loading", "validating", "ready", "idle", "degraded", "draining", "failed")


class Told(NamedTuple):
    """One metric: its name without prefix and `_total`, and what docs/metrics.md says of it."""

    name: str
    family: type[CounterMetricFamily | GaugeMetricFamily]
    text: str
    labels: tuple[str, ...] = ()


# of the deployment; always `moorage:`
OWN = (
    Told(
        "state",
        GaugeMetricFamily,
        f"1 for the state it is in, 0 for the others: {', '.join(STATES)}.",
        ("state",),
    ),
    Told("load_progress", GaugeMetricFamily, "Of the load, 0 to 1."),
    Told(
        "planned_bytes",
        GaugeMetricFamily,
        "Bytes that were planned, by kind: weights, kv, overhead.",
        ("device", "kind"),
    ),
    Told(
        "measured_bytes",
        GaugeMetricFamily,
        "Bytes that are there, by kind: allocated, reserved; on accelerators by torch's allocator.",
        ("device", "kind"),
    ),
    Told(
        "plan_error_bytes",
        GaugeMetricFamily,
        "Bytes of weights measured when they were proven, less those planned.",
        ("device",),
    ),
    Told("certificate_valid", GaugeMetricFamily, "1 while the placement is proven."),
    Told("watch_checks", CounterMetricFamily, "Looks whether the model is what was proven."),
    Told("watch_findings", GaugeMetricFamily, "Changes found since the proof."),
    Told("kv_tokens_planned", GaugeMetricFamily, "Tokens the KV cache was planned for."),
    Told("kv_tokens_used", GaugeMetricFamily, "Tokens held in the KV cache."),
    Told("engine_steps", CounterMetricFamily, "Forwards run since the model was loaded."),
    Told("request_failure", CounterMetricFamily, "Sequences that ended because their step failed."),
)
# what vLLM has too: under the prefix of `server.metrics_prefix`
ENGINES = (
    Told("num_requests_running", GaugeMetricFamily, "Sequences that are computed now.", LABELS),
    Told("num_requests_waiting", GaugeMetricFamily, "Sequences that wait to be computed.", LABELS),
    Told(
        "kv_cache_usage_perc",
        GaugeMetricFamily,
        "Share of the planned KV tokens that is held, 0 to 1.",
        LABELS,
    ),
    Told(
        "prompt_tokens",
        CounterMetricFamily,
        "Tokens of prompts computed since the model was loaded.",
        LABELS,
    ),
    Told(
        "generation_tokens",
        CounterMetricFamily,
        "Tokens chosen since the model was loaded.",
        LABELS,
    ),
    Told(
        "prefix_cache_queries",
        CounterMetricFamily,
        "Tokens of prompts that were looked for among those computed before.",
        LABELS,
    ),
    Told(
        "prefix_cache_hits",
        CounterMetricFamily,
        "Tokens of prompts that were found computed.",
        LABELS,
    ),
    Told(
        "num_preemptions",
        CounterMetricFamily,
        "Sequences that gave way for want of memory.",
        LABELS,
    ),
)
BY_NAME = {told.name: told for told in (*OWN, *ENGINES)}


def add_routes(app: Flask, deployment: Deployment, registry: CollectorRegistry) -> None:
    """registry: what it has is told as well."""
    registry.register(_Collected(deployment))

    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    told = Operation("The same and the engine's counts, for Prometheus", "text/plain")
    routes.add(app, "/metrics", metrics, told)


class _Collected(Collector):
    """Called by the registry once per scrape, from the thread that serves it."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names are not needed at registration, before there is anything to read."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        document = self._deployment.document()
        yield from _state(document)
        yield from _devices(document.get("devices") or [])
        yield from _proof(document)
        planned = (document.get("kv") or {}).get("planned_tokens")
        if planned is not None:
            yield _one("kv_tokens_planned", planned)
        yield from _engine(self._deployment, planned)


def _family(name: str, prefix: str = "moorage") -> Any:
    """An empty family of what is told by this name."""
    told = BY_NAME[name]
    return told.family(f"{prefix}:{name}", told.text, labels=told.labels)


def _one(name: str, value: float, labels: tuple[str, ...] = (), prefix: str = "moorage") -> Any:
    """A family of one sample."""
    family = _family(name, prefix)
    family.add_metric(labels, value)
    return family


def _state(document: Mapping[str, Any]) -> Iterator[Metric]:
    state = _family("state")
    for name in STATES:
        state.add_metric([name], float(document.get("state") == name))
    yield state
    yield _one("load_progress", document.get("progress") or 0.0)


def _devices(devices: list[Mapping[str, Any]]) -> Iterator[Metric]:
    """Planned and measured bytes; a device without a number has no sample."""
    planned, measured = _family("planned_bytes"), _family("measured_bytes")
    error = _family("plan_error_bytes")
    for device in devices:
        for family, key in ((planned, "planned"), (measured, "measured")):
            for kind, size in (device.get(key) or {}).items():
                family.add_metric([device["id"], kind], size)
        if device.get("plan_error_bytes") is not None:
            error.add_metric([device["id"]], device["plan_error_bytes"])
    yield from (planned, measured, error)


def _proof(document: Mapping[str, Any]) -> Iterator[Metric]:
    certificate, watch = document.get("certificate"), document.get("watch")
    valid = bool(certificate and certificate.get("valid"))
    yield _one("certificate_valid", float(valid))
    if watch:
        yield _one("watch_checks", watch.get("checks") or 0)
        yield _one("watch_findings", len(watch.get("findings") or ()))


def _engine(deployment: Deployment, planned: int | None) -> Iterator[Metric]:
    """The engine's counts; nothing before there is one."""
    try:
        serving = deployment.serving()
    except (NotReady, PlacementDrifted):
        return
    stats = serving.engine.stats()
    yield _one("kv_tokens_used", stats.kv_tokens)
    yield _one("engine_steps", stats.steps)
    yield _one("request_failure", stats.failed)
    counts: dict[str, float] = {
        "num_requests_running": stats.running,
        "num_requests_waiting": stats.waiting,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.tokens,
        "num_preemptions": stats.preemptions,
        "prefix_cache_hits": stats.prefix_tokens,
        "prefix_cache_queries": stats.prompt_tokens + stats.prefix_tokens,
    }
    if planned:
        counts["kv_cache_usage_perc"] = stats.kv_tokens / planned
    labels, prefix = (serving.model_id, ENGINE), deployment.config.server.metrics_prefix
    for name, value in counts.items():
        yield _one(name, value, labels, prefix)
