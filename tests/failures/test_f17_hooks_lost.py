"""F17: the hooks that bring offloaded weights are removed, by a library that "cleans up"."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.errors import EngineStopped
from service.errors import PlacementDrifted
from service.placement.certificate import certify
from service.placement.watch import Watch
from service.testing.placing import dispatched
from tests.support.overlapping import PATIENCE_S
from tests.support.placing import IDS
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import offloaded
from tests.support.placing import refusal
from tests.support.placing import scribble
from tests.support.tiny import save_tiny

HEAD_ON_DISK = {"lm_head": "disk"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


def test_plain_transformers_answers_garbage_without_its_hooks(folder: Path) -> None:
    """Fails when torch refuses meta weights in a product, or accelerate keeps its hooks."""
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    model = dispatched(folder, HEAD_ON_DISK)
    torch.testing.assert_close(logits(model), expected)
    remove_hook_from_submodules(model)
    scribble(model)
    values = logits(model)
    assert values.device.type == "cpu"
    assert values.shape == expected.shape
    assert not torch.allclose(values, expected)


def test_ours_certifies_no_model_without_its_hooks(folder: Path) -> None:
    model = dispatched(folder, HEAD_ON_DISK)
    remove_hook_from_submodules(model)
    error = refusal(judged(model, folder))
    assert "lm_head.weight was left on meta (F1)" in error.message


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[Engine, Watch, PreTrainedModel]]:
    loaded = offloaded(folder)
    assert certify(loaded).valid
    engine = Engine(
        Runner(loaded.model, loaded.strategy.place_inputs, max_context=64, max_sequences=2),
        max_queue=4,
    )
    engine.start()
    watch = Watch(loaded.model, 30.0)
    engine.look_with(watch.look)
    yield engine, watch, loaded.model
    engine.close()


def test_ours_notices_while_serving_and_names_the_modules(
    served: tuple[Engine, Watch, PreTrainedModel],
) -> None:
    engine, watch, model = served
    assert engine.inspect(PATIENCE_S)
    assert engine.alive
    remove_hook_from_submodules(model)
    engine.inspect(PATIENCE_S)
    error = watch.error()
    assert error is not None
    assert error.failure_class == "F17"
    assert "was under AlignDevicesHook for cpu" in error.message
    assert "is without its hook" in error.message
    lost = {change.name for change in watch.changes if change.failure_class == "F17"}
    assert "model.layers.3.mlp.down_proj" in lost
    with pytest.raises(EngineStopped, match="without its hook"):
        engine.submit([1, 2, 3], SamplingParams(max_tokens=2))


def test_ours_ends_a_running_answer_instead_of_going_on_with_garbage(
    served: tuple[Engine, Watch, PreTrainedModel],
) -> None:
    engine, _, model = served
    stream = engine.submit(IDS[0].tolist(), SamplingParams(max_tokens=50, temperature=0.0))
    stream.read(PATIENCE_S)

    def lose_hooks(module: torch.nn.Module, args: object, output: object) -> None:
        """After a whole forward, on the thread of the engine."""
        handle.remove()
        remove_hook_from_submodules(model)
        engine.inspect(0.0)

    def read_on() -> None:
        while stream.read(PATIENCE_S):
            pass

    handle = model.register_forward_hook(lose_hooks)
    with pytest.raises(PlacementDrifted, match=r"the model changed while serving \(F17\)"):
        read_on()
    assert stream.completion_tokens < 50
