"""The guarded load: what it reports, what it restores, what it returns."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers import modeling_utils
from transformers.utils import logging as transformers_logging

from service.errors import LoadFailed
from service.errors import PlacementMismatch
from service.errors import PluginError
from service.placement import loading
from service.placement import registry
from service.placement.loading import KeyReport
from tests.support.placing import ROOMY
from tests.support.placing import bring_up
from tests.support.placing import config_of
from tests.support.placing import variant
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False)


def test_it_returns_the_model_with_all_that_the_certificate_needs(folder: Path) -> None:
    loaded = bring_up(folder)
    assert not loaded.model.training
    assert loaded.strategy.name == "cpu"
    assert loaded.config.folder == folder
    assert loaded.placement.devices == ("cpu",)
    assert loaded.keys == (KeyReport(),)
    assert loaded.seconds > 0
    assert loaded.notes == ()


def test_a_strategy_that_forgets_eval_mode_is_helped(folder: Path) -> None:
    def load(config: Any, placement: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(config.folder).train()

    assert not bring_up(folder, variant(load=load)).model.training


def test_progress_grows_from_nothing_to_all(folder: Path) -> None:
    strategy = variant()
    config = registry.settle(config_of(folder), strategy, {})
    shares: list[float] = []
    loading.load(strategy, config, strategy.plan(config, ROOMY), shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] < 1
    assert shares[-1] == 1.0
    assert len(shares) == len(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_no_bar_and_no_table_is_drawn(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    capfd.readouterr()
    bring_up(folder)
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("transformers")]


@pytest.mark.parametrize("raises", [False, True])
def test_what_it_changes_in_transformers_it_puts_back(folder: Path, raises: bool) -> None:
    def hook(factory: Any, args: Any, kwargs: Any) -> Any:
        return factory(*args, **kwargs)

    def load(config: Any, placement: Any) -> Any:
        assert transformers_logging.get_verbosity() == logging.ERROR
        if raises:
            raise OSError("unplugged")
        return AutoModelForCausalLM.from_pretrained(config.folder)

    report = modeling_utils.log_state_dict_report
    verbosity = transformers_logging.get_verbosity()
    before = transformers_logging.set_tqdm_hook(hook)
    transformers_logging.set_verbosity_info()
    try:
        try:
            bring_up(folder, variant(load=load))
        except LoadFailed:
            assert raises
        assert transformers_logging.get_verbosity() == logging.INFO
        assert modeling_utils.log_state_dict_report is report
        assert transformers_logging.set_tqdm_hook(before) is hook
    finally:
        transformers_logging.set_tqdm_hook(before)
        transformers_logging.set_verbosity(verbosity)


def test_the_report_still_raises_for_an_error_that_is_not_about_keys(folder: Path) -> None:
    """transformers collects conversion errors and raises them at the end; so do we."""

    class Info:
        missing_keys: tuple[str, ...] = ()
        unexpected_keys: tuple[str, ...] = ()
        mismatched_keys: tuple[str, ...] = ()
        error_msgs = ("cannot convert",)
        conversion_errors: tuple[str, ...] = ()

    said: list[Any] = []
    original = modeling_utils.log_state_dict_report
    modeling_utils.log_state_dict_report = lambda *args, **kwargs: said.append(args)
    try:
        with loading.observed(lambda share: None) as keys:
            modeling_utils.log_state_dict_report(None, None, None, Info())
    finally:
        modeling_utils.log_state_dict_report = original
    assert len(said) == 1
    assert keys == [KeyReport()]


def test_every_model_a_strategy_loads_is_reported(folder: Path) -> None:
    def load(config: Any, placement: Any) -> Any:
        AutoModelForCausalLM.from_pretrained(config.folder)
        return AutoModelForCausalLM.from_pretrained(config.folder)

    assert bring_up(folder, variant(load=load)).keys == (KeyReport(), KeyReport())


# --- the bar


def bar(*args: Any, **kwargs: Any) -> tuple[loading._Bar, list[float]]:
    shares: list[float] = []
    return loading._Bar(shares.append, args, kwargs), shares


def test_a_bar_over_a_list_hands_its_items_on_and_counts_them() -> None:
    one, shares = bar([5, 6, 7, 8])
    assert list(one) == [5, 6, 7, 8]
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_a_bar_with_a_total_is_updated_by_hand_and_never_exceeds_it() -> None:
    with bar(total=4)[0] as one:
        one.set_description("Loading weights")
        one.refresh()
        one.close()
    one, shares = bar(total=4)
    one.update()
    one.update(2)
    one.update(3)
    assert shares == [0.25, 0.75, 1.0]


def test_a_bar_of_unknown_length_says_nothing() -> None:
    one, shares = bar(iterable=(i for i in range(3)))
    assert list(one) == [0, 1, 2]
    assert shares == []
    assert list(bar()[0]) == []


# --- what a strategy may do wrong


def test_what_load_raises_is_named_with_the_authors_line(folder: Path) -> None:
    def load(config: Any, placement: Any) -> Any:
        raise ValueError("two\nlines")

    with pytest.raises(LoadFailed) as caught:
        bring_up(folder, variant(load=load))
    message = caught.value.message
    assert message.startswith("strategy cpu: load raised ValueError: two lines (test_loading.py:")
    assert caught.value.__cause__ is None
    assert caught.value.exit_status == 1


def test_out_of_memory_has_a_way_out(folder: Path) -> None:
    import torch

    def load(config: Any, placement: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(LoadFailed, match="OutOfMemoryError") as caught:
        bring_up(folder, variant(load=load))
    assert caught.value.hint is not None
    assert "lower max_context or max_sequences" in caught.value.hint


def test_an_error_on_purpose_keeps_its_kind_and_hint(folder: Path) -> None:
    def load(config: Any, placement: Any) -> Any:
        raise PlacementMismatch("the expert is elsewhere", hint="map it", tensors=["expert"])

    with pytest.raises(PlacementMismatch, match="the expert is elsewhere") as caught:
        bring_up(folder, variant(load=load))
    assert (caught.value.hint, caught.value.tensors) == ("map it", ("expert",))


@pytest.mark.parametrize("result", [None, "cpu", 7, {}])
def test_what_is_not_a_model_is_refused_by_what_it_is(folder: Path, result: Any) -> None:
    strategy = variant(load=lambda config, placement: result)
    with pytest.raises(PluginError) as caught:
        bring_up(folder, strategy)
    assert f"strategy cpu: load returned {result!r}; it must return the model" in str(caught.value)


def test_a_file_that_is_no_checkpoint_fails_the_load(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(LoadFailed, match="strategy cpu: load raised SafetensorError"):
        bring_up(folder)


# --- keys


def test_keys_of_a_whole_checkpoint_pass() -> None:
    loading.check_keys([], frozenset())
    loading.check_keys([KeyReport(), KeyReport()], frozenset())


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (KeyReport(missing=("a", "b")), "2 tensors are missing in the checkpoint"),
        (KeyReport(unexpected=("a", "b")), "2 tensors are unexpected in the checkpoint"),
        (KeyReport(mismatched=("a", "b")), "2 tensors are mismatched in shape in the checkpoint"),
    ],
)
def test_keys_that_differ_are_refused_but_for_those_allowed(report: KeyReport, words: str) -> None:
    with pytest.raises(PlacementMismatch, match=words) as caught:
        loading.check_keys([KeyReport(), report], frozenset({"c"}))
    assert caught.value.tensors == ("a", "b")
    with pytest.raises(PlacementMismatch, match=r"^1 tensor is ") as caught:
        loading.check_keys([report], frozenset({"a"}))
    assert caught.value.tensors == ("b",)
    loading.check_keys([report], frozenset({"a", "b"}))


def test_memory_in_ram_is_that_of_live_tensors_each_counted_once() -> None:
    import torch

    loading.collect()
    before = loading.allocated_bytes()["cpu"]
    held = torch.zeros(3, 2**20)
    views = [held[0], held.T, torch.nn.Parameter(held)]
    assert loading.allocated_bytes()["cpu"] - before == held.nbytes
    del held, views
    assert loading.allocated_bytes()["cpu"] == before


def test_tensors_that_an_attempt_left_in_ram_are_told() -> None:
    import torch

    before = loading.allocated_bytes()
    held = torch.zeros(2**24 + 2**22)  # 80 MiB
    with pytest.raises(LoadFailed, match=r"cpu still holds 80 MiB of a failed attempt \(F21\)"):
        loading.reclaim(None, before)
    del held
    loading.reclaim(None, before)
