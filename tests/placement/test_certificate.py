"""The certificate as data, and how a check that fails or breaks is written down."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import PlacementMismatch
from service.placement.certificate import Certificate
from service.placement.certificate import Check
from service.placement.certificate import certify
from service.placement.checks import CHECKS
from tests.support.placing import bring_up
from tests.support.placing import offloaded
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny

CLASSES = ["F1", "F2", "F3", "F4", "F7", "F8", "F12", "F13", "F14", "F15", "F16"]
NAMES = [*CLASSES, "strategy", "inputs", "forward"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=True, layers=4)


def test_every_check_is_run_in_order_and_counts_what_it_looked_at(folder: Path) -> None:
    certificate = certify(bring_up(folder))
    assert [check.name for check in certificate.checks] == NAMES == [name for name, _ in CHECKS]
    checked = {check.name: check.checked for check in certificate.checks}
    tensors = 4 * 9 + 3
    assert checked["F1"] == checked["F15"] == tensors
    assert checked["F2"] == checked["F3"] == 2
    assert checked["F16"] == tensors - 1  # a tied head has no values of its own
    assert checked["F7"] == checked["F8"] == 1
    assert checked["F4"] > 20
    assert checked["forward"] > 100
    assert all(check.seconds >= 0 for check in certificate.checks)


def test_a_certificate_is_json(folder: Path) -> None:
    body = json.loads(json.dumps(certify(bring_up(folder)).as_dict()))
    assert body.keys() == {
        "valid",
        "issued_at",
        "seconds",
        "load_seconds",
        "budget_seconds",
        "versions",
        "plan_hash",
        "devices",
        "plan_error_bytes",
        "quantized_linears",
        "tensors_sampled",
        "checks",
    }
    assert body["valid"] is True
    assert body["seconds"] >= sum(check["ms"] for check in body["checks"]) / 1000 - 0.01
    assert body["plan_error_bytes"] == {"cpu": 0}
    assert body["tensors_sampled"] == 4 * 9 + 2
    assert datetime.fromisoformat(body["issued_at"]).tzinfo is not None
    assert body["quantized_linears"] == 0
    for check in body["checks"]:
        assert check.keys() == {"class", "status", "checked", "ms"}
        assert check["status"] == "pass"


@pytest.mark.parametrize(("load_s", "budget_s"), [(0.5, 1.0), (20.0, 1.0), (300.0, 15.0)])
def test_a_certificate_may_cost_a_twentieth_of_the_load_or_a_second(
    load_s: float, budget_s: float
) -> None:
    body = Certificate((), "now", {}, 0, seconds=0.2, load_seconds=load_s).as_dict()
    assert (body["seconds"], body["load_seconds"]) == (0.2, load_s)
    assert body["budget_seconds"] == budget_s


def test_a_certificate_has_the_versions_of_what_it_depends_on(folder: Path) -> None:
    versions = certify(bring_up(folder)).versions
    assert list(versions) == ["moorage", "python", "torch", "transformers", "accelerate"]
    assert torch.__version__.startswith(versions["torch"])  # "+cpu" may follow
    quantized = certify(bring_up(folder, quantize="nf4")).versions
    assert list(quantized) == [*versions, "bitsandbytes"]


def test_the_plan_error_is_what_is_there_less_what_was_planned(folder: Path) -> None:
    loaded = bring_up(folder)
    loaded.model.register_buffer("extra", torch.zeros(100), persistent=False)
    assert certify(loaded).as_dict()["plan_error_bytes"] == {"cpu": 400}
    split = offloaded(folder)
    assert certify(split).plan_errors == {"cpu": 0, "disk": 0}


def test_bytes_are_counted_where_they_rest_and_tied_ones_once(folder: Path) -> None:
    whole = bring_up(folder)
    size = sum(p.numel() * 4 for p in whole.model.parameters()) + 2 * 8 * 4
    assert certify(whole).devices == {"cpu": size}
    split = offloaded(folder)
    devices = certify(split).devices
    assert devices.keys() == {"cpu", "disk"}
    assert devices["disk"] == split.placement.memory["disk"].weights
    assert devices["cpu"] + devices["disk"] == size


def test_a_failed_check_has_its_message_and_makes_it_invalid(folder: Path) -> None:
    loaded = bring_up(folder)
    loaded.model.model.norm.to("meta")
    certificate = certify(loaded)
    assert not certificate.valid
    body = certificate.as_dict()
    assert body["valid"] is False
    [failed] = [check for check in body["checks"] if check["class"] == "F1"]
    assert failed["status"] == "fail"
    assert failed["checked"] == 0
    assert failed["message"].startswith("model.norm.weight was left on meta (F1)")


def test_the_first_failure_is_the_error() -> None:
    first, second = PlacementMismatch("first"), PlacementMismatch("second")
    checks = (
        Check("F1", "pass", 3, 0.1),
        Check("F2", "fail", 0, 0.1, first),
        Check("F4", "fail", 0, 0.1, second),
    )
    certificate = Certificate(checks, "2026-01-01T00:00:00+00:00", {}, 0)
    assert certificate.failure() is first
    assert not certificate.valid
    assert Certificate(checks[:1], "", {}, 0).failure() is None


def test_a_check_that_breaks_is_a_failed_check_that_names_the_strategy(folder: Path) -> None:
    loaded = bring_up(folder)

    def explode(*args: Any, **kwargs: Any) -> Any:
        raise LookupError("no such expert")

    loaded.model.model.layers[0].forward = explode
    error = refusal(certify(loaded))
    assert error.message.startswith(
        "strategy cpu: forward check raised LookupError: no such expert (test_certificate.py:"
    )
    assert error.failure_class is None
    assert error.__traceback__ is None


def test_a_validate_that_refuses_is_the_check_called_strategy(folder: Path) -> None:
    def validate(model: Any, placement: Any) -> None:
        raise PlacementMismatch("the router is alone", tensors=["router"])

    certificate = certify(bring_up(folder, variant(validate=validate)))
    assert refusal(certificate).tensors == ("router",)
    [failed] = [check for check in certificate.checks if check.status == "fail"]
    assert failed.name == "strategy"
    assert certificate.checks[-1] is failed  # what follows would run the model


def test_logits_of_another_shape_are_refused(folder: Path) -> None:
    loaded = bring_up(folder)
    loaded.model.register_forward_hook(
        lambda module, args, output: output.__class__(logits=output.logits[..., :100])
    )
    error = refusal(certify(loaded))
    assert error.message == "logits have shape (1, 4, 100); expected (1, 4, 258)"


@pytest.mark.parametrize(
    ("place_inputs", "words"),
    [
        (lambda model, inputs: None, "place_inputs returned NoneType for inputs ['input_ids']"),
        (lambda model, inputs: {}, "place_inputs returned [] for inputs ['input_ids']"),
        (
            lambda model, inputs: {"input_ids": inputs["input_ids"][:, :2]},
            "place_inputs returned (1, 2) for input_ids of (1, 4)",
        ),
        (
            lambda model, inputs: {"input_ids": inputs["input_ids"].int()},
            "place_inputs returned torch.int32 for input_ids of torch.int64",
        ),
        (
            lambda model, inputs: {"input_ids": inputs["input_ids"].flip(1)},
            "place_inputs changed the values of input_ids",
        ),
        (
            lambda model, inputs: {"input_ids": inputs["input_ids"].add_(1)},
            "place_inputs changed its argument input_ids",
        ),
        (
            lambda model, inputs: {"input_ids": inputs.pop("input_ids")},
            "place_inputs changed its argument input_ids",
        ),
    ],
)
def test_a_place_inputs_that_breaks_its_contract_is_refused(
    folder: Path, place_inputs: Any, words: str
) -> None:
    error = refusal(certify(bring_up(folder, variant(place_inputs=place_inputs))))
    assert f"strategy cpu: {words}" in error.message


def test_an_intended_finding_is_declared_and_nothing_else_is_switched_off(folder: Path) -> None:
    """`allows` says that offload is meant; it does not excuse a tensor nobody owns."""
    loaded = offloaded(folder)
    assert "offload" in loaded.placement.allows
    loaded.model.lm_head.weight = type(loaded.model.lm_head.weight)(
        loaded.model.lm_head.weight.detach().to("meta")
    )
    assert refusal(certify(loaded)).failure_class == "F1"
