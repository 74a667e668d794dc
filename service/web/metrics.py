"""GET /metrics: the deployment in Prometheus' text format, read when it is asked for.

Names end as vLLM's do, so that dashboards need another prefix only.
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

STATES = ("planned", "loading", "validating", "ready", "degraded", "draining", "failed")
# of the engine's counts: attribute, metric, what it is
GAUGES = (
    ("running", "num_requests_running", "Sequences that are computed now."),
    ("waiting", "num_requests_waiting", "Sequences that wait to be computed."),
    ("kv_tokens", "kv_tokens_used", "Tokens held in the KV cache."),
)
COUNTERS = (
    ("tokens", "generation_tokens", "Tokens chosen since the start."),
    ("steps", "engine_steps", "Forwards run since the start."),
    ("failed", "request_failure", "Sequences that ended because their step failed."),
)


def add_routes(app: Flask, deployment: Deployment) -> None:
    registry = CollectorRegistry()
    registry.register(_Collected(deployment))

    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    app.add_url_rule("/metrics", view_func=metrics)


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
        stats = deployment.serving().engine.stats()
    except (NotReady, PlacementDrifted):
        return
    for attribute, name, text in GAUGES:
        value = getattr(stats, attribute, None)
        if value is not None:
            yield GaugeMetricFamily(f"moorage:{name}", text, value=value)
    for attribute, name, text in COUNTERS:
        value = getattr(stats, attribute, None)
        if value is not None:
            yield CounterMetricFamily(f"moorage:{name}", text, value=value)
    used = getattr(stats, "kv_tokens", None)
    if planned and used is not None:
        text = "Share of the planned KV tokens that is held, 0 to 1."
        yield GaugeMetricFamily("moorage:kv_cache_usage_perc", text, value=used / planned)
