"""The `devices` of GET /placement, the hash of a plan, and how far a plan was off."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.placement import describe
from service.placement.certificate import Certificate
from service.placement.overhead import FIXED
from service.placement.plan import DeviceMemory
from service.placement.plan import Placement
from service.placement.plan import Unit
from tests.placement.test_plan import placement
from tests.support.planned import GIB
from tests.support.planned import cards

EACH = {"weights": 10, "kv": 1}


def test_a_device_is_described_with_what_was_planned_there():
    first = describe.devices(placement(), cards(24 * GIB, 24 * GIB))[0]
    assert first == {
        "id": "cuda:0",
        "name": "card",
        "total": 24 * GIB + FIXED,
        "free_before": 24 * GIB + FIXED,
        "planned": {"weights": 60, "kv": 5, "overhead": 1},
        "overhead_parts": {},
        "measured": None,
        "plan_error_bytes": None,
        "modules": [
            {"name": "embed", "count": 1, "bytes": 10, "each": [EACH]},
            {"name": "layers.0-4", "count": 5, "bytes": 50, "each": [EACH] * 5},
        ],
        "reason": "it is on cuda:0 with 6 neighbours from embed to layers.4, cut so that the room "
        "left is even: 24.5 GiB on cuda:0",
    }


def test_a_device_that_only_a_strategy_knows_the_reason_for_says_so():
    plan = Placement(
        devices=("cpu",),
        module_map={"": "cpu"},
        memory={"cpu": DeviceMemory(weights=10)},
        units=(Unit("embed", 10),),
    )
    found = describe.devices(plan, cards())[0]
    assert found["reason"] == "it is on cpu because the strategy says so"


def test_the_disk_has_no_size_but_free_space():
    last = describe.devices(placement(), cards(GIB, disk=7 * GIB))[-1]
    assert (last["id"], last["total"], last["free_before"]) == ("disk", None, 7 * GIB)
    assert "planned" not in last


def test_a_certificate_adds_what_was_measured():
    certificate = Certificate((), "2026-01-01T00:00:00+00:00", {"cpu": 123}, 0)
    plan = Placement(devices=("cpu",), module_map={"": "cpu"})
    found = describe.devices(plan, cards(), certificate)
    assert found[0]["measured"] == {"allocated": 123}
    assert found[0]["plan_error_bytes"] is None, "nothing was planned"
    certificate = replace(certificate, plan_errors={"cpu": -7})
    assert describe.devices(plan, cards(), certificate)[0]["plan_error_bytes"] == -7


def test_nothing_is_described_before_the_plan():
    assert describe.devices(None, cards()) == []
    assert describe.devices(placement(), None) == []


# --- the hash of a plan


def loading(**kwargs: Any) -> Placement:
    return replace(placement(), load_kwargs=kwargs)


def test_equal_plans_have_one_hash_whatever_the_order_of_their_keys():
    first = loading(dtype="auto", device_map={"a": 0, "b": 1})
    second = loading(device_map={"b": 1, "a": 0}, dtype="auto")
    assert describe.plan_hash(first) == describe.plan_hash(second)
    assert len(describe.plan_hash(first)) == 64
    assert describe.plan_hash(first) == describe.plan_hash(replace(first, notes=("well",)))


@pytest.mark.parametrize(
    "change",
    [
        {"devices": ("cpu",)},
        {"module_map": {"": "cpu"}},
        {"memory": {"cpu": DeviceMemory(1)}},
        {"load_kwargs": {"dtype": "float16"}},
        {"allows": frozenset({"offload"})},
        {"quantized": 7},
        {"context": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_plan_has_another_hash(change: dict[str, Any]):
    assert describe.plan_hash(replace(placement(), **change)) != describe.plan_hash(placement())


HASH = """
from service.placement.describe import plan_hash
from service.placement.plan import Placement
from service.placement.plan import Unit
from service.placement.planning import quantization
class Odd: pass
kwargs = {"quantization_config": quantization("nf4", "bfloat16"), "odd": Odd(), "s": {"a", "b"}}
print(plan_hash(Placement(load_kwargs=kwargs, allows=frozenset({"offload", "x", "y"}))))
"""


def test_every_process_gives_a_plan_the_same_hash():
    root = Path(__file__).resolve().parents[2]
    found = {
        subprocess.run(
            [sys.executable, "-c", HASH],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join((str(root), os.environ.get("PYTHONPATH", ""))),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


# --- plan against actual


def test_devices_without_a_plan_of_their_weights_have_no_error():
    plan = Placement(devices=("cpu",), module_map={"": "cpu"})
    assert describe.plan_errors(plan, {"cpu": 100}) == {}
    plan = replace(plan, memory={"cpu": DeviceMemory(90), "disk": DeviceMemory()})
    assert describe.plan_errors(plan, {"cpu": 100}) == {"cpu": 10}
    assert describe.plan_errors(plan, {}) == {"cpu": -90}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (0, None),
        (50, None),
        (-50, None),
        (51, "cpu holds 51 bytes of weights more than planned (1,000)"),
        (-51, "cpu holds 51 bytes of weights less than planned (1,000)"),
    ],
)
def test_a_plan_that_is_off_by_more_than_a_twentieth_is_a_warning(error: int, words: str | None):
    plan = Placement(memory={"cpu": DeviceMemory(1000, 500, 500)})
    assert describe.plan_warnings(plan, {"cpu": error}) == ([] if words is None else [words])
