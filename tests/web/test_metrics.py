"""GET /metrics, in every state."""

from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import PlacementDrifted
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_engine import FakeEngine

DOCUMENT = {
    "state": "ready",
    "progress": 1.0,
    "kv": {"planned_tokens": 400},
    "devices": [
        {
            "id": "cuda:0",
            "planned": {"weights": 100, "kv": 20, "overhead": 3},
            "measured": {"allocated": 130, "reserved": 140},
            "plan_error_bytes": -2,
        },
        {"id": "disk", "planned": {"weights": 7, "kv": 0, "overhead": 0}, "measured": None},
    ],
    "certificate": {"valid": True},
    "watch": {"checks": 9, "findings": []},
}


@dataclass
class Stats:
    running: int = 3
    waiting: int = 1
    steps: int = 50
    tokens: int = 70
    kv_tokens: int = 100
    failed: int = 2


@dataclass
class Counting(FakeEngine):
    def stats(self) -> Any:
        return Stats()


class Documented(FakeDeployment):
    def document(self) -> dict[str, Any]:
        return {**DOCUMENT, "state": self.state}


def scraped(deployment: FakeDeployment) -> dict[str, float]:
    """Sample -> value, labels' values behind the name."""
    response = create_app(deployment).test_client().get("/metrics")
    assert response.status_code == 200
    assert response.content_type.startswith("text/plain; version=0.0.4")
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_a_ready_deployment_tells_everything():
    found = scraped(Documented(model=FakeServing(engine=Counting())))
    assert {name: value for name, value in found.items() if "state" not in name} == {
        "moorage:load_progress": 1.0,
        "moorage:planned_bytes cuda:0 weights": 100,
        "moorage:planned_bytes cuda:0 kv": 20,
        "moorage:planned_bytes cuda:0 overhead": 3,
        "moorage:planned_bytes disk weights": 7,
        "moorage:planned_bytes disk kv": 0,
        "moorage:planned_bytes disk overhead": 0,
        "moorage:measured_bytes cuda:0 allocated": 130,
        "moorage:measured_bytes cuda:0 reserved": 140,
        "moorage:plan_error_bytes cuda:0": -2,
        "moorage:certificate_valid": 1,
        "moorage:watch_checks_total": 9,
        "moorage:watch_findings": 0,
        "moorage:kv_tokens_planned": 400,
        "moorage:num_requests_running": 3,
        "moorage:num_requests_waiting": 1,
        "moorage:kv_tokens_used": 100,
        "moorage:generation_tokens_total": 70,
        "moorage:engine_steps_total": 50,
        "moorage:request_failure_total": 2,
        "moorage:kv_cache_usage_perc": 0.25,
    }
    assert [name for name in found if "state" in name and found[name]] == ["moorage:state ready"]


@pytest.mark.parametrize("state", ["planned", "loading", "validating", "draining", "failed"])
def test_it_answers_before_and_after_it_is_ready(state: str):
    """The engine is not asked, and what is not known yet has no sample."""
    found = scraped(FakeDeployment(state=state, progress=0.25))
    assert found[f"moorage:state {state}"] == 1
    assert found["moorage:load_progress"] == 0.25
    assert found["moorage:certificate_valid"] == 0
    assert not any("requests" in name or "bytes" in name for name in found)


def test_a_changed_model_is_no_error_of_the_scrape():
    drift = PlacementDrifted("lm_head.weight was cast", failure_class="F18")
    found = scraped(FakeDeployment(state="degraded", drift=drift))
    assert found["moorage:state degraded"] == 1


def test_an_engine_that_counts_less_is_told_as_far_as_it_goes():
    found = scraped(FakeDeployment())
    assert "moorage:generation_tokens_total" not in found


def test_two_applications_do_not_share_a_registry():
    for deployment in (FakeDeployment(), FakeDeployment(state="loading")):
        assert scraped(deployment)[f"moorage:state {deployment.state}"] == 1


def test_metrics_need_a_key_where_there_are_keys(make_client):
    client = make_client(api_keys=["k"])
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer k"}).status_code == 200
