"""GET /metrics: the deployment in Prometheus' text format, read when it is asked for.

What vLLM has too has its name and labels, under the prefix of `server.metrics_prefix`; what it
does not have (state, placement, proof, watch) is always `moorage:`.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

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
# of the engine's counts: attribute, metric, what it is. First those that vLLM has.
GAUGES = (
    ("running", "num_requests_running", "Sequences that are computed now."),
    ("waiting", "num_requests_waiting", "Sequences that wait to be computed."),
)
COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts computed since the start."),
    ("tokens", "generation_tokens", "Tokens chosen since the start."),
    ("preemptions", "num_preemptions", "Sequences that gave way for want of memory."),
    ("prefix_tokens", "prefix_cache_hits", "Tokens of prompts that were found computed."),
)
OWN_GAUGES = (("kv_tokens", "kv_tokens_used", "Tokens held in the KV cache."),)
OWN_COUNTERS = (
    ("steps", "engine_steps", "Forwards run since the start."),
    ("failed", "request_failure", "Sequences that ended because their step failed."),
)


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
            text = "Tokens the KV cache was planned for."
            yield GaugeMetricFamily("moorage:kv_tokens_planned", text, value=planned)
        yield from _engine(self._deployment, planned)


def _state(document: Mapping[str, Any]) -> Iterator[Metric]:
    state = GaugeMetricFamily("moorage:state", "1 for the state it is in.", labels=["state"])
    for name in STATES:
        state.add_metric([name], float(document.get("state") == name))
    yield state
    progress = document.get("progress") or 0.0
    yield GaugeMetricFamily("moorage:load_progress", "Of the load, 0 to 1.", value=progress)


def _devices(devices: list[Mapping[str, Any]]) -> Iterator[Metric]:
    """Planned and measured bytes; a device without a number has no sample."""
    planned = GaugeMetricFamily(
        "moorage:planned_bytes", "Bytes that were planned.", labels=["device", "kind"]
    )
    measured = GaugeMetricFamily(
        "moorage:measured_bytes",
        "Bytes that are there; on accelerators by torch's allocator.",
        labels=["device", "kind"],
    )
    error = GaugeMetricFamily(
        "moorage:plan_error_bytes",
        "Bytes of weights measured when they were proven, less those planned.",
        labels=["device"],
    )
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
    yield GaugeMetricFamily(
        "moorage:certificate_valid", "1 while the placement is proven.", value=float(valid)
    )
    if watch:
        looks, findings = watch.get("checks") or 0, watch.get("findings") or ()
        yield CounterMetricFamily("moorage:watch_checks", "Looks for changes.", value=looks)
        text = "Changes found since the proof."
        yield GaugeMetricFamily("moorage:watch_findings", text, value=len(findings))


def _engine(deployment: Deployment, planned: int | None) -> Iterator[Metric]:
    """The engine's counts; nothing before there is one."""
    try:
        serving = deployment.serving()
    except (NotReady, PlacementDrifted):
        return
    stats = serving.engine.stats()
    prefix = deployment.config.server.metrics_prefix
    labels = (serving.model_id, ENGINE)
    for attribute, name, text in OWN_GAUGES:
        yield GaugeMetricFamily(f"moorage:{name}", text, value=getattr(stats, attribute))
    for attribute, name, text in OWN_COUNTERS:
        yield CounterMetricFamily(f"moorage:{name}", text, value=getattr(stats, attribute))
    for attribute, name, text in GAUGES:
        gauge = GaugeMetricFamily(f"{prefix}:{name}", text, labels=LABELS)
        gauge.add_metric(labels, getattr(stats, attribute))
        yield gauge
    for attribute, name, text in COUNTERS:
        counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=LABELS)
        counter.add_metric(labels, getattr(stats, attribute))
        yield counter
    text = "Tokens of prompts that were looked for among those computed before."
    queries = CounterMetricFamily(f"{prefix}:prefix_cache_queries", text, labels=LABELS)
    queries.add_metric(labels, stats.prompt_tokens + stats.prefix_tokens)
    yield queries
    if planned:
        text = "Share of the planned KV tokens that is held, 0 to 1."
        share = GaugeMetricFamily(f"{prefix}:kv_cache_usage_perc", text, labels=LABELS)
        share.add_metric(labels, stats.kv_tokens / planned)
        yield share
