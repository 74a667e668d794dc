"""F18: somebody casts or moves the model after it was dispatched and proven."""

from pathlib import Path

import pytest
import torch

from service.placement.certificate import certify
from service.placement.watch import Watch
from service.testing.placing import dispatched
from service.testing.self_test.serving import ON_DISK
from tests.support.placing import IDS
from tests.support.placing import bring_up
from tests.support.placing import logits
from tests.support.placing import offloaded
from tests.support.placing import scribble
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


def test_plain_half_is_not_blocked_on_a_dispatched_model_and_retypes_it(folder: Path) -> None:
    """Fails when accelerate blocks `.half()` as it blocks `.to()` and `.cuda()`."""
    model = dispatched(folder, ON_DISK)
    before = logits(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    after = logits(model)
    assert after.dtype == torch.float16  # also what its hooks bring from the disk is cast
    assert not torch.equal(after.float(), before)


def test_plain_to_is_blocked_on_a_dispatched_model_but_not_on_its_modules(folder: Path) -> None:
    """Fails when accelerate blocks the modules as well: then moving is no longer silent."""
    model = dispatched(folder, ON_DISK)
    expected = logits(model)
    with pytest.raises(RuntimeError, match="You can't move a model that has some modules offload"):
        model.to("meta")
    model.lm_head.to("meta")
    scribble(model)
    assert not torch.allclose(logits(model), expected)


@pytest.mark.parametrize("where", ["in RAM", "partly on disk"])
def test_ours_notices_half(folder: Path, where: str) -> None:
    loaded = bring_up(folder) if where == "in RAM" else offloaded(folder)
    assert certify(loaded).valid
    logits(loaded.model)
    watch = Watch(loaded.model, 30.0)
    assert watch.look(thorough=False) is None
    loaded.model.half()
    error = watch.look(thorough=False)
    assert error is not None
    assert error.failure_class == "F18"
    assert "was float32, is float16" in error.message
    assert "model.layers.3.mlp.down_proj.weight" in error.tensors


def test_ours_notices_a_moved_module(folder: Path) -> None:
    loaded = offloaded(folder)
    logits(loaded.model, IDS)
    watch = Watch(loaded.model, 30.0)
    loaded.model.model.embed_tokens.to("meta")
    error = watch.look(thorough=False)
    assert error is not None
    assert error.tensors == ("model.embed_tokens.weight",)
    assert "(F18): model.embed_tokens.weight was on cpu, is on meta" in error.message
