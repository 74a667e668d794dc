"""The reference of all metrics, made from their definitions.

`python -m service.web.metrics_reference` prints docs/metrics.md.
"""

import sys
from collections.abc import Collection
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily

from service.web import latency
from service.web import metrics

INTRODUCTION = """\
# Metrics

<!-- Made by `python -m service.web.metrics_reference > docs/metrics.md`; a test compares. -->

`GET /metrics` is Prometheus' text format, read at the moment it is asked for. With API keys set it
needs one, as everything but the health endpoints does. [Monitoring](howto/monitoring.md) has a
scrape config, alerts and a dashboard.

## The deployment

Always `moorage:`. What is not known yet has no sample.
"""
ENGINE = """
## Requests and the engine

What vLLM has too has its name, type, buckets and labels (`model_name`, and `engine`, which is
always 0), with `moorage` before the colon, or with `server.metrics_prefix: vllm` its own prefix, so
that dashboards made for it work unchanged. Gauges and the engine's counters are there while a model
serves. Histograms and `request_success_total` have a value for each sequence, noted when its
request ends, and appear with the first of them. A histogram is told as `_bucket`, `_sum` and
`_count`.
"""
LEFT_OUT = """
Of vLLM's list are left out what has nothing behind it here (LoRA, speculation, media, KV transfer,
sleep) and `iteration_tokens_total`, `request_params_*`, `cache_config_info`.
"""
HEADS = ("| metric | type | labels | what it is |", "| --- | --- | --- | --- |")


def markdown() -> str:
    """docs/metrics.md."""
    ended, text, labels = latency.ENDED
    engines = [
        *_rows(metrics.ENGINES),
        _row(f"{ended}_total", "counter", labels, text),
        *(
            _row(name, "histogram", latency.LABELS, f"{text} {_span(name, buckets)}")
            for name, text, buckets in latency.HISTOGRAMS
        ),
    ]
    own = "\n".join([*HEADS, *_rows(metrics.OWN)])
    return f"{INTRODUCTION}\n{own}\n{ENGINE}\n" + "\n".join([*HEADS, *engines]) + f"\n{LEFT_OUT}"


def _rows(told: Iterable[metrics.Told]) -> list[str]:
    rows = []
    for one in told:
        counter = one.family is CounterMetricFamily
        name = f"{one.name}_total" if counter else one.name
        rows.append(_row(name, "counter" if counter else "gauge", one.labels, one.text))
    return rows


def _row(name: str, kind: str, labels: Collection[str], text: str) -> str:
    named = ", ".join(f"`{label}`" for label in labels)
    return f"| `moorage:{name}` | {kind} | {named} | {text} |"


def _span(name: str, buckets: Collection[float]) -> str:
    """What its buckets reach over."""
    unit = " s" if name.endswith("_seconds") else ""
    return f"Buckets from {min(buckets):g} to {max(buckets):,g}{unit}."


if __name__ == "__main__":
    sys.stdout.write(markdown())
