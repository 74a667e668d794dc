"""What loaders swap is recorded when the service is imported, compared, and put back."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from service.placement import guard
from tests.support.gates import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    yield
    guard.heal()


def test_an_untouched_process_has_no_findings() -> None:
    assert guard.findings() == []
    assert guard.heal() == []
    assert guard.watched_count() > 20


@pytest.mark.parametrize(
    ("owner", "attribute", "named"),
    [
        (PreTrainedModel, "tie_weights", "PreTrainedModel.tie_weights"),
        (PreTrainedModel, "init_weights", "PreTrainedModel.init_weights"),
        (nn.Module, "register_parameter", "Module.register_parameter"),
        (nn.Module, "register_buffer", "Module.register_buffer"),
        (torch, "linspace", "torch.linspace"),
        (torch, "empty", "torch.empty"),
        (nn.init, "normal_", "torch.nn.init.normal_"),
        (nn.init, "kaiming_uniform_", "torch.nn.init.kaiming_uniform_"),
    ],
)
def test_a_swapped_function_is_named_and_put_back(
    owner: object, attribute: str, named: str
) -> None:
    before = vars(owner)[attribute]
    setattr(owner, attribute, lambda *args, **kwargs: None)
    assert guard.findings() == [named]
    assert guard.heal() == [named]
    assert vars(owner)[attribute] is before
    assert guard.findings() == []


def test_a_default_dtype_is_named_and_put_back() -> None:
    torch.set_default_dtype(torch.float16)
    assert guard.findings() == ["torch default dtype is torch.float16"]
    guard.heal()
    assert torch.get_default_dtype() == torch.float32


POISONED_BEFORE_IMPORT = """
from transformers import initialization

with initialization.no_tie_weights():
    from service.placement import guard
print(guard.findings())
try:
    guard.heal()
except guard.LoadFailed as error:
    print(error.failure_class, error.one_line())
"""


def test_a_process_poisoned_before_the_import_is_refused_not_taken_for_pristine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", POISONED_BEFORE_IMPORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    findings, refusal = done.stdout.splitlines()
    assert "PreTrainedModel.tie_weights" in findings
    assert refusal.startswith("F4 another load was under way when Moorage was imported")
    assert "restart the process" in refusal


def test_no_step_begins_while_a_load_has_swapped_globals_and_those_that_run_end_first() -> None:
    stillness = guard.Stillness()
    order: list[str] = []
    stepping, end, swapped, release, stepped = (threading.Event() for _ in range(5))

    def long_step() -> None:
        with stillness.step():
            stepping.set()
            end.wait(PATIENCE_S)
            order.append("step")

    def load() -> None:
        stepping.wait(PATIENCE_S)
        with stillness.keep(), stillness.keep():
            order.append("load")
            swapped.set()
            release.wait(PATIENCE_S)
            order.append("loaded")

    def next_step() -> None:
        swapped.wait(PATIENCE_S)
        with stillness.step():
            order.append("next")
            stepped.set()

    threads = [threading.Thread(target=run) for run in (long_step, load, next_step)]
    for thread in threads:
        thread.start()
    assert not swapped.wait(0.05)
    end.set()
    assert swapped.wait(PATIENCE_S)
    assert not stepped.wait(0.05)
    release.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == ["step", "load", "loaded", "next"]


def test_many_steps_run_at_once() -> None:
    stillness = guard.Stillness()
    both = threading.Barrier(2, timeout=PATIENCE_S)

    def step() -> None:
        with stillness.step():
            both.wait()

    threads = [threading.Thread(target=step) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not both.broken
