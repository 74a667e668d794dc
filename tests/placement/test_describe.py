"""The `devices` of GET /placement."""

from service.placement import describe
from service.placement.certificate import Certificate
from service.placement.plan import Placement
from tests.placement.test_plan import placement
from tests.support.planned import GIB
from tests.support.planned import cards


def test_a_device_is_described_with_what_was_planned_there():
    first = describe.devices(placement(), cards(24 * GIB, 24 * GIB))[0]
    assert first == {
        "id": "cuda:0",
        "name": "card",
        "total": 24 * GIB,
        "free_before": 24 * GIB,
        "planned": {"weights": 60, "kv": 5, "overhead": 1},
        "measured": None,
        "modules": [
            {"name": "embed", "count": 1, "bytes": 10},
            {"name": "layers.0-4", "count": 5, "bytes": 50},
        ],
    }


def test_the_disk_has_no_size_but_free_space():
    last = describe.devices(placement(), cards(GIB, disk=7 * GIB))[-1]
    assert (last["id"], last["total"], last["free_before"]) == ("disk", None, 7 * GIB)
    assert "planned" not in last


def test_a_certificate_adds_what_was_measured():
    certificate = Certificate((), "2026-01-01T00:00:00+00:00", {"cpu": 123}, 0)
    plan = Placement(devices=("cpu",), module_map={"": "cpu"})
    found = describe.devices(plan, cards(), certificate)
    assert found[0]["measured"] == {"allocated": 123}


def test_nothing_is_described_before_the_plan():
    assert describe.devices(None, cards()) == []
    assert describe.devices(placement(), None) == []
