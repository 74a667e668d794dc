"""F4: overlapping loads of a tied model poison the process, and every later load in it.

The seed of the project: `from_pretrained` swaps `PreTrainedModel.tie_weights` out while it builds
a model; of two that overlap, the second puts back the first's empty function.
"""

import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel

from service.errors import LoadFailed
from service.placement import guard
from service.placement.certificate import certify
from tests.support.overlapping import PATIENCE_S
from tests.support.overlapping import ForeignLoad
from tests.support.overlapping import during_construction
from tests.support.overlapping import overlapping_loads
from tests.support.placing import bring_up
from tests.support.placing import built_in
from tests.support.placing import judged
from tests.support.placing import logits
from tests.support.placing import refusal
from tests.support.placing import scribble
from tests.support.placing import variant
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=True)


@pytest.fixture
def foreign() -> Iterator[ForeignLoad]:
    load = ForeignLoad()
    yield load
    load.leave()


def tied(model: PreTrainedModel) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


# --- plain transformers


def test_plain_overlapping_loads_leave_the_head_on_meta_and_answer_garbage(folder: Path) -> None:
    """Fails when `from_pretrained` no longer swaps `PreTrainedModel.tie_weights`, or locks."""
    first, second = overlapping_loads(folder)
    assert tied(first)
    assert second.lm_head.weight.is_meta
    expected = logits(first)
    scribble(first)
    values = logits(second)  # no error
    assert values.device.type == "cpu"
    assert not torch.allclose(values, expected)


def test_plain_loads_stay_broken_for_the_rest_of_the_process(folder: Path) -> None:
    """Fails when a load repairs what an earlier one left behind."""
    overlapping_loads(folder)
    for _ in range(2):  # single-threaded, nothing overlaps any more
        later = AutoModelForCausalLM.from_pretrained(folder)
        assert later.lm_head.weight.is_meta
    assert PreTrainedModel.tie_weights.__qualname__ == "no_tie_weights.<locals>.empty_func"


# --- ours


def test_ours_heals_what_an_earlier_overlap_left_and_says_so(folder: Path) -> None:
    overlapping_loads(folder)
    assert "PreTrainedModel.tie_weights" in guard.findings()
    loaded = bring_up(folder)
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    assert tied(loaded.model)
    assert len(loaded.notes) == 1
    assert "an earlier load had left PreTrainedModel.tie_weights" in loaded.notes[0]
    assert "(F4); restored" in loaded.notes[0]
    torch.testing.assert_close(logits(loaded.model), logits(tiny_model("llama", tie=True)))


def test_a_model_that_the_overlap_stranded_is_refused(folder: Path) -> None:
    """Also when it comes back from a strategy that loaded it in its own threads."""
    _, second = overlapping_loads(folder)
    guard.heal()
    error = refusal(judged(second, folder))
    assert (error.failure_class, error.tensors) == ("F1", ("lm_head.weight",))


def test_a_process_poisoned_after_the_load_has_no_valid_certificate(folder: Path) -> None:
    loaded = bring_up(folder)
    overlapping_loads(folder)
    error = refusal(certify(loaded))
    assert error.failure_class == "F4"
    assert "another load overlapped: PreTrainedModel.tie_weights" in error.message
    assert error.hint == "load models through Moorage only"


def test_two_overlapping_loads_through_ours_are_serialised_and_both_valid(folder: Path) -> None:
    inside: list[str] = []
    most = 0
    start = threading.Barrier(2)
    original = built_in().select("cpu").hooks["load"]

    def counted(**arguments: Any) -> Any:
        nonlocal most
        inside.append(threading.current_thread().name)
        most = max(most, len(inside))
        model = original(**arguments)
        inside.pop()
        return model

    valid: list[bool] = []

    def run() -> None:
        start.wait(PATIENCE_S)
        loaded = bring_up(folder, variant(load=counted))
        valid.append(certify(loaded).valid and tied(loaded.model) and not loaded.notes)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert valid == [True, True]
    assert most == 1


def test_a_load_waits_while_another_one_holds_the_lock(folder: Path) -> None:
    done = threading.Event()
    thread = threading.Thread(target=lambda: (bring_up(folder), done.set()))
    with guard.LOAD_LOCK:
        thread.start()
        assert not done.wait(0.05)
    assert done.wait(PATIENCE_S)
    thread.join(PATIENCE_S)


def test_a_foreign_load_that_begins_before_ours_and_ends_after_it_is_healed(
    folder: Path, foreign: ForeignLoad
) -> None:
    foreign.enter()
    loaded = bring_up(folder)
    assert certify(loaded).valid
    assert "(F4)" in loaded.notes[0]
    foreign.leave()
    assert certify(loaded).valid


def entering_once(foreign: ForeignLoad) -> Callable[[Callable[[], None]], None]:
    """For `during_construction`: the foreign load begins where ours has swapped its functions."""
    entered: list[bool] = []

    def act(construct: Callable[[], None]) -> None:
        if not entered:
            entered.append(True)
            foreign.enter()
        construct()

    return act


def test_a_foreign_load_that_leaves_out_of_step_makes_ours_load_again(
    folder: Path, foreign: ForeignLoad
) -> None:
    """It puts back ours' empty function, when ours has already put back the real one."""
    original = built_in().select("cpu").hooks["load"]
    loads = 0

    def load(**arguments: Any) -> Any:
        nonlocal loads
        loads += 1
        if loads > 1:
            return original(**arguments)
        with during_construction(entering_once(foreign)):
            model = original(**arguments)
        foreign.leave()
        return model

    loaded = bring_up(folder, variant(load=load))
    assert loads == 2
    assert loaded.notes == (
        "another load overlapped: PreTrainedModel.tie_weights (F4); restored; reloading",
    )
    assert certify(loaded).valid
    assert tied(loaded.model)


def test_a_foreign_load_that_leaves_after_ours_is_done_is_found_by_the_certificate(
    folder: Path, foreign: ForeignLoad
) -> None:
    original = built_in().select("cpu").hooks["load"]

    def load(**arguments: Any) -> Any:
        with during_construction(entering_once(foreign)):
            return original(**arguments)

    loaded = bring_up(folder, variant(load=load))
    assert certify(loaded).valid
    foreign.leave()
    assert refusal(certify(loaded)).failure_class == "F4"
    assert certify(bring_up(folder)).valid


def test_a_foreign_load_that_swaps_tying_out_while_ours_ties_makes_ours_load_again(
    folder: Path,
) -> None:
    """The window in which the globals look right before and after, and the model is wrong."""
    from transformers import modeling_utils

    original = modeling_utils.PreTrainedModel._finalize_model_loading
    foreign: list[ForeignLoad] = []

    def finalize(*args: Any, **kwargs: Any) -> Any:
        if not foreign:
            foreign.append(ForeignLoad())
            foreign[0].enter()
        try:
            return original(*args, **kwargs)
        finally:
            foreign[0].leave()

    modeling_utils.PreTrainedModel._finalize_model_loading = staticmethod(finalize)
    try:
        loaded = bring_up(folder)
    finally:
        modeling_utils.PreTrainedModel._finalize_model_loading = staticmethod(original)
    assert loaded.notes == (
        "another load overlapped: tying of lm_head.weight (F4); restored; reloading",
    )
    assert certify(loaded).valid


def test_a_load_that_is_overlapped_every_time_is_refused_by_name(folder: Path) -> None:
    calls = 0
    original = built_in().select("cpu").hooks["load"]

    def load(**arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        model = original(**arguments)
        PreTrainedModel.tie_weights = lambda self: None
        return model

    with pytest.raises(LoadFailed, match="3 loads in a row were overlapped") as caught:
        bring_up(folder, variant(load=load))
    assert calls == 3
    assert "PreTrainedModel.tie_weights" in caught.value.message
    assert caught.value.failure_class == "F4"
    assert caught.value.hint == "load models through Moorage only, or in another process"
    assert guard.findings() == []


def test_a_strategy_that_leaves_the_default_dtype_changed_is_loaded_again(folder: Path) -> None:
    original = built_in().select("cpu").hooks["load"]
    calls = 0

    def load(**arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        model = original(**arguments)
        if calls == 1:
            torch.set_default_dtype(torch.bfloat16)
        return model

    loaded = bring_up(folder, variant(load=load))
    assert calls == 2
    assert "torch default dtype is torch.bfloat16" in loaded.notes[0]
    assert torch.get_default_dtype() == torch.float32


def test_a_load_that_raised_half_way_leaves_nothing_swapped(folder: Path) -> None:
    def load(**arguments: Any) -> Any:
        PreTrainedModel.tie_weights = lambda self: None
        torch.set_default_dtype(torch.float64)
        raise RuntimeError("the cable is out")

    with pytest.raises(LoadFailed, match="load raised RuntimeError: the cable is out"):
        bring_up(folder, variant(load=load))
    assert guard.findings() == []
    assert certify(bring_up(folder)).valid


def test_a_certificate_is_not_given_while_somebody_loads(folder: Path) -> None:
    loaded = bring_up(folder)
    PreTrainedModel.tie_weights = lambda self: None
    assert refusal(certify(loaded)).failure_class == "F4"
