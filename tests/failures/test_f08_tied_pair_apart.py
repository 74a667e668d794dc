"""F8: the two ends of a tied pair on different devices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from service.errors import PlacementMismatch
from service.placement.certificate import certify
from service.placement.loading import Loaded
from service.placement.plan import device_of
from service.testing.placing import dispatched
from service.testing.self_test.maps import APART
from tests.support.placing import bring_up
from tests.support.placing import built_in
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import offloaded
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=True)


def apart(folder: Path) -> PreTrainedModel:
    return dispatched(folder, {"lm_head": "disk"})


def declared(folder: Path) -> Loaded:
    """As `apart`, by a strategy whose plan says all of it."""

    def plan(config: Any, hardware: Any) -> Any:
        placement = built_in().select("cpu").plan(config, hardware)
        return replace(
            placement,
            devices=("cpu", "disk"),
            module_map=APART,
            allows=frozenset({"offload"}),
        )

    return bring_up(folder, variant(plan=plan, load=lambda config, placement: apart(config.folder)))


def test_plain_transformers_loads_it_and_dies_at_the_first_request(folder: Path) -> None:
    """Fails when transformers or accelerate refuses such a map, or makes it work."""
    model = apart(folder)
    assert not any(p.is_meta for p in model.parameters())
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        logits(model)


def test_ours_refuses_and_names_both_ends(folder: Path) -> None:
    error = refusal(certify(declared(folder)))
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F8"
    assert set(error.tensors) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert "model.embed_tokens.weight is on cpu" in error.message
    assert "lm_head.weight is nowhere" in error.message
    assert error.hint == "map lm_head and model.embed_tokens to one device"


def test_ours_refuses_it_without_a_plan_that_says_so_too(folder: Path) -> None:
    certificate = judged(apart(folder), folder)
    failed = [check.name for check in certificate.checks if check.status == "fail"]
    assert "F8" in failed


def test_a_head_that_was_moved_away_from_its_embedding_is_refused(folder: Path) -> None:
    model = tiny_model("llama", tie=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to("meta"))
    failed = {c.name: c.error for c in judged(model, folder).checks if c.status == "fail"}
    assert {"F1", "F8"} <= failed.keys()
    assert "lm_head.weight is nowhere" in str(failed["F8"])


@pytest.mark.parametrize("layers", [2, 4])
def test_our_plans_keep_a_tied_pair_together(tmp_path: Path, layers: int) -> None:
    folder = save_tiny(tmp_path / "deep", "llama", tie=True, layers=4)
    loaded = offloaded(folder, layers)
    places = loaded.placement.module_map
    assert "disk" in places.values()
    assert device_of("lm_head", places) == device_of("model.embed_tokens", places)
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    torch.testing.assert_close(
        logits(loaded.model), logits(tiny_model("llama", tie=True, layers=4))
    )
