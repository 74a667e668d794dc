"""What a plan looks at is seen, and only what its author wrote is blamed on him."""

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from service.placement import hardware
from service.testing import watching

HERE = Path(__file__).name


def mine(file: str) -> bool:
    return file == __file__


@pytest.mark.parametrize(
    ("look", "what"),
    [
        (lambda: os.environ.get("HOME"), "the variable HOME"),
        (lambda: os.getenv("HOME"), "the variable HOME"),
        (lambda: "HOME" in os.environ, "the variable HOME"),
        (lambda: dict(os.environ), "the environment"),
        (lambda: time.time(), "the clock"),
        (lambda: datetime.datetime.now(), "the clock"),
        (lambda: Path.cwd(), "the current folder"),
        (lambda: Path("x").absolute(), "the current folder"),
        (lambda: torch.cuda.is_available(), "the GPUs"),
        (lambda: psutil.virtual_memory(), "the memory"),
        (lambda: os.cpu_count(), "the processor"),
        (lambda: hardware.detect(Path()), "the machine"),
    ],
)
def test_a_glance_is_seen_with_its_line(look: Callable[[], object], what: str):
    with watching.watched(mine) as watch:
        look()
    line = look.__code__.co_firstlineno
    assert watching.Look(what, f"{HERE}:{line}") in watch.looks


def test_what_a_library_looks_at_is_not_blamed_on_its_caller():
    from transformers import LlamaConfig

    with watching.watched(mine) as watch:
        LlamaConfig()
        hardware.invent("2x24GiB")
        torch.empty(2)
    assert watch.looks == []


def test_the_former_profile_function_is_back_also_after_an_error():
    import sys

    before = sys.getprofile()
    with pytest.raises(ValueError, match="no"), watching.watched(mine):
        raise ValueError("no")
    assert sys.getprofile() is before


def test_elsewhere_is_another_place_and_time_and_ends(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MY_DEVICE", "cuda:7")
    before = (Path.cwd(), dict(os.environ), time.time)
    with watching.elsewhere(tmp_path):
        assert Path.cwd() == tmp_path.resolve()
        assert "MY_DEVICE" not in os.environ
        assert "PATH" in os.environ
        assert time.time() > before[2]() + 364 * 86_400
    assert (Path.cwd(), dict(os.environ), time.time) == before


def test_settings_of_a_quantiser_compare_by_value():
    from transformers import BitsAndBytesConfig

    one, other = ({"q": BitsAndBytesConfig(load_in_8bit=True)} for _ in range(2))
    assert watching.by_value(one) == watching.by_value(other)
    assert watching.by_value(one) != watching.by_value({"q": BitsAndBytesConfig()})
