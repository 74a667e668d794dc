"""F5: what a load swaps, every thread of the process sees."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from service.placement import footprint
from service.placement import guard
from service.placement.certificate import certify
from service.testing.self_test.loads import in_a_thread
from service.testing.self_test.loads import locked
from tests.support.overlapping import PATIENCE_S
from tests.support.overlapping import during_construction
from tests.support.placing import bring_up
from tests.support.placing import config_of
from tests.support.placing import variant
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", dtype=torch.bfloat16)


def test_plain_a_linear_built_while_another_thread_builds_an_empty_model_is_on_meta() -> None:
    """Fails when `init_empty_weights` no longer swaps `nn.Module.register_parameter`."""
    with init_empty_weights():
        linear = in_a_thread(lambda: nn.Linear(4, 4))
    assert linear.weight.is_meta


def test_plain_a_tensor_made_while_another_thread_loads_has_the_loads_dtype(folder: Path) -> None:
    """Fails when `from_pretrained` no longer sets the process's default dtype."""
    seen: list[torch.dtype] = []

    def act(construct: Callable[[], None]) -> None:
        seen.append(in_a_thread(lambda: torch.ones(1).dtype))
        construct()

    with during_construction(act):
        AutoModelForCausalLM.from_pretrained(folder)
    assert seen == [torch.bfloat16]


def test_the_lock_is_held_while_ours_loads_and_free_afterwards(folder: Path) -> None:
    held: list[bool] = []

    def act(construct: Callable[[], None]) -> None:
        held.append(locked())
        construct()

    with during_construction(act):
        bring_up(folder)
    # the skeletons that are planned with, and the model
    assert len(held) >= 2
    assert all(held)
    assert not locked()


def test_no_forward_of_a_certificate_runs_while_a_model_loads(folder: Path) -> None:
    loaded = bring_up(folder)
    inside: list[bool] = []
    loaded.model.register_forward_pre_hook(lambda module, args: inside.append(locked()))
    assert certify(loaded).valid
    assert inside == [True]


def test_a_skeleton_is_not_built_while_a_model_loads(folder: Path) -> None:
    done = threading.Event()

    def plan() -> None:
        footprint.measure(config_of(folder), on_cpu=True, native_bfloat16=True)
        done.set()

    thread = threading.Thread(target=plan)
    with guard.LOAD_LOCK:
        thread.start()
        assert not done.wait(0.05)
    assert done.wait(PATIENCE_S)
    thread.join(PATIENCE_S)


def test_the_lock_is_free_after_a_load_that_raised(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "broken", "llama")
    (folder / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(Exception, match="strategy cpu: load raised"):
        bring_up(folder)
    assert not locked()


def test_what_an_empty_model_swaps_is_watched() -> None:
    with init_empty_weights():
        names = guard.findings()
    assert names == ["Module.register_parameter"]
    assert guard.findings() == []


def test_what_a_load_swaps_is_watched(folder: Path) -> None:
    names: list[list[str]] = []

    def act(construct: Callable[[], None]) -> None:
        names.append(guard.findings())
        construct()

    with during_construction(act):
        AutoModelForCausalLM.from_pretrained(folder)
    assert {"PreTrainedModel.tie_weights", "torch.linspace"} <= set(names[0])
    assert "torch default dtype is torch.bfloat16" in names[0]


def test_a_strategy_may_look_at_the_models_shape_while_it_loads(folder: Path) -> None:
    """The thread that loads is not kept out by its own lock."""

    def load(config: Any, placement: Any) -> Any:
        footprint.measure(config, on_cpu=True, native_bfloat16=True)
        return AutoModelForCausalLM.from_pretrained(config.folder)

    assert certify(bring_up(folder, variant(load=load))).valid
