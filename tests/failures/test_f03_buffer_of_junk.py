"""F3: a buffer on the right device, of the right shape, with whatever was in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from service.errors import PlacementMismatch
from service.placement import guard
from service.placement.certificate import Certificate
from service.placement.certificate import certify
from service.testing.self_test.values import Scaled
from tests.support.placing import IDS
from tests.support.placing import bring_up
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import offloaded
from tests.support.placing import planned
from tests.support.placing import refusal
from tests.support.placing import variant
from tests.support.tiny import save_tiny

FREQUENCIES = "model.rotary_emb.inv_freq"


class Careful(Scaled):
    """The same, computed again where transformers asks for it."""

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if module is self and not self.scale.is_meta:
            self.scale.copy_(torch.arange(1.0, 65.0))


class Random(LlamaForCausalLM):
    """A random projection: nobody can say what its values should be."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("projection", torch.randn(8, 8), persistent=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


def checked(certificate: Certificate) -> int:
    [check] = [check for check in certificate.checks if check.name == "F3"]
    assert check.status == "pass"
    return check.checked


def test_plain_transformers_leaves_such_a_buffer_uncomputed_and_says_nothing(folder: Path) -> None:
    """Fails when `from_pretrained` computes what __init__ computed."""
    model, info = Scaled.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.scale.device.type == "cpu"
    assert not torch.equal(model.scale, Scaled(model.config).scale)


def test_plain_transformers_answers_wrongly_with_junk_in_its_frequencies(folder: Path) -> None:
    """The outcome: finite logits, other ones."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    sound = logits(model)
    model.model.rotary_emb.inv_freq.fill_(0.5)
    wrong = logits(model)
    assert torch.isfinite(wrong).all()
    assert not torch.allclose(wrong, sound)


def test_ours_refuses_a_buffer_that_was_not_computed_again(folder: Path) -> None:
    model = Scaled.from_pretrained(folder)
    model.scale.fill_(-7)  # memory may by chance hold what the last one left there
    error = refusal(judged(model, folder))
    assert isinstance(error, PlacementMismatch)
    assert (error.failure_class, error.tensors) == ("F3", ("scale",))
    assert error.message == (
        "scale differs from what Scaled computes (F3): it begins with -7, -7, -7, "
        "computed are 1, 2, 3"
    )
    assert "_init_weights" in str(error.hint)
    assert guard.findings() == []


@pytest.mark.parametrize(
    "junk",
    [
        lambda b: b.zero_(),
        lambda b: b.fill_(float("nan")),
        lambda b: b.mul_(1.01),
        lambda b: b[-1:].zero_(),
    ],
    ids=["zeros", "nan", "a percent more", "one value"],
)
def test_ours_sees_whatever_is_written_into_the_frequencies(folder: Path, junk: Any) -> None:
    loaded = bring_up(folder)
    junk(loaded.model.model.rotary_emb.inv_freq)
    error = refusal(certify(loaded))
    assert (error.failure_class, error.tensors) == ("F3", (FREQUENCIES,))


def test_ours_sees_a_buffer_of_another_shape(folder: Path) -> None:
    loaded = bring_up(folder)
    loaded.model.model.rotary_emb.inv_freq = torch.ones(3)
    assert "(F3): [3], computed are [8]" in refusal(certify(loaded)).message


def test_ours_sees_it_in_an_offloaded_model_too(folder: Path) -> None:
    loaded = offloaded(folder)
    loaded.model.model.rotary_emb.inv_freq.zero_()
    assert refusal(certify(loaded)).tensors == (FREQUENCIES,)


@pytest.mark.parametrize("kind", [Careful, Random])
def test_a_buffer_that_is_computed_again_or_random_passes(folder: Path, kind: Any) -> None:
    certificate = judged(kind.from_pretrained(folder), folder)
    assert certificate.valid, certificate.failure()
    assert checked(certificate) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_buffer_that_was_cast_passes(folder: Path, dtype: torch.dtype) -> None:
    loaded = bring_up(folder)
    loaded.model.to(dtype)
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    assert loaded.model.model.rotary_emb.inv_freq.dtype == dtype


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_grow_with_the_prompt_pass_after_use(tmp_path: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        rope |= {"original_max_position_embeddings": 4}
    folder = save_tiny(tmp_path / "m", "llama", rope_parameters=rope, max_position_embeddings=4)
    loaded = bring_up(folder)
    fresh = loaded.model.model.rotary_emb.inv_freq.clone()
    logits(loaded.model, IDS.repeat(1, 4))
    assert not torch.equal(loaded.model.model.rotary_emb.inv_freq, fresh)
    assert checked(certify(loaded)) == 2
    loaded.model.model.rotary_emb.inv_freq = torch.zeros(8)
    assert refusal(certify(loaded)).failure_class == "F3"


def test_a_buffer_that_is_meant_is_named_by_the_strategy(folder: Path) -> None:
    plan = replace(planned(folder), allows=frozenset({FREQUENCIES}))
    loaded = bring_up(folder, variant(plan=lambda config, hardware: plan))
    loaded.model.model.rotary_emb.inv_freq.mul_(0.5)
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()


def test_the_check_leaves_the_process_as_it_was(folder: Path) -> None:
    loaded = bring_up(folder, dtype="bfloat16")
    before = torch.get_rng_state()
    assert checked(certify(loaded)) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert guard.findings() == []


def test_a_class_that_cannot_be_built_from_its_config_is_not_judged(folder: Path) -> None:
    class Odd(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig, *, wheels: int) -> None:
            super().__init__(config)

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.__class__ = Odd
    assert checked(judged(model, folder)) == 0
