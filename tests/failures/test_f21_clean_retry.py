"""F21: a failed attempt whose memory the next one does not get back."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from service.errors import LoadFailed
from service.errors import PlacementMismatch
from service.errors import PluginError
from service.errors import ServiceError
from service.placement import loading
from service.placement.certificate import certify
from service.testing.self_test.loads import Loads
from service.testing.self_test.loads import raising
from tests.support.placing import bring_up
from tests.support.placing import judged
from tests.support.placing import variant
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False)


def test_plain_a_kept_exception_keeps_the_half_loaded_model(folder: Path) -> None:
    """Python's own rule: a traceback holds its frames. Fails never; it is why ours drops it."""
    load = Loads(raising(RuntimeError, "half-way"))
    try:
        load(type("C", (), {"folder": folder}), None)
    except RuntimeError as error:
        kept = error
        assert load.alive
    kept.with_traceback(None)
    assert not load.alive


@pytest.mark.parametrize(
    ("then", "kind", "message"),
    [
        (raising(RuntimeError, "half-way"), LoadFailed, "load raised RuntimeError: half-way"),
        (raising(PlacementMismatch, "too small"), PlacementMismatch, "too small"),
        (lambda model: None, PluginError, "load returned None; it must return the model"),
        (lambda model: [model], PluginError, r"load returned \[Llama.*; it must return the model"),
    ],
)
def test_a_kept_exception_of_ours_keeps_no_model(
    folder: Path, then: Any, kind: type[ServiceError], message: str
) -> None:
    load = Loads(then)
    with pytest.raises(kind, match=message) as caught:
        bring_up(folder, variant(load=load))
    assert caught.value.message
    assert not load.alive
    assert certify(bring_up(folder)).valid


def test_a_checkpoint_that_was_refused_is_not_kept_by_the_error(folder: Path) -> None:
    def load(config: Any, placement: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(config.folder, num_hidden_layers=3)
        models.append(weakref.ref(model))
        return model

    models: list[weakref.ref[nn.Module]] = []
    with pytest.raises(PlacementMismatch, match="F15") as caught:
        bring_up(folder, variant(load=load))
    gc.collect()
    assert models[0]() is None
    assert caught.value.failure_class == "F15"


def test_a_refused_certificate_keeps_no_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.to("meta")
    reference = weakref.ref(model)
    certificate = judged(model, folder)
    del model
    gc.collect()
    assert reference() is None
    assert certificate.failure() is not None


def test_a_certificate_whose_forward_raised_keeps_no_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(model.lm_head.weight[:3, :3])
    reference = weakref.ref(model)
    certificate = judged(model, folder)
    del model
    gc.collect()
    assert reference() is None
    assert "model.layers.0.mlp.down_proj cannot run: RuntimeError" in str(certificate.failure())


def test_reclaim_is_content_when_the_model_is_gone(folder: Path) -> None:
    loading.reclaim(None, {})
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = weakref.ref(model)
    del model
    loading.reclaim(reference, loading.allocated_bytes())


def test_reclaim_refuses_while_somebody_holds_the_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(LoadFailed, match=r"still referenced; .* \(F21\)") as caught:
        loading.reclaim(weakref.ref(model), {})
    assert caught.value.failure_class == "F21"
    assert caught.value.hint == "the strategy keeps it somewhere: drop it in `release`"


def test_reclaim_refuses_while_a_device_holds_more_than_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "allocated_bytes", lambda: {"cuda:1": 300 * 2**20})
    with pytest.raises(LoadFailed, match=r"cuda:1 still holds 200 MiB of a failed attempt \(F21\)"):
        loading.reclaim(None, {"cuda:1": 100 * 2**20})
    loading.reclaim(None, {"cuda:1": 299 * 2**20})
