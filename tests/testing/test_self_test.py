"""The trials of `moorage doctor --self-test`: one for every class, and none that ends the others.

What they find with real libraries is tested by the command, in a process of its own.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import DoesNotFit
from service.placement.certificate import Certificate
from service.placement.certificate import Check
from service.testing.self_test import outcome
from service.testing.self_test import run
from service.testing.self_test.outcome import NotTried
from service.testing.self_test.outcome import Outcome
from service.testing.self_test.run import TRIALS
from service.testing.self_test.run import Trial


def test_every_class_is_tried_once_and_in_order() -> None:
    assert [trial.failure_class for trial in TRIALS] == [f"F{number}" for number in range(1, 23)]
    assert len({trial.attempt for trial in TRIALS}) == len(TRIALS)
    assert all(len(trial.what) <= 50 for trial in TRIALS)


def not_tried(folder: Path) -> Any:
    raise NotTried("there is no cable")


def broken(folder: Path) -> Any:
    raise AttributeError("module 'torch' has no attribute 'nn'")


def fine(folder: Path) -> Any:
    return (folder / "model.safetensors").is_file(), False


def test_a_trial_that_cannot_be_made_or_breaks_says_why_and_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [Trial(f"F{n}", "it is so", act) for n, act in enumerate((not_tried, broken, fine))]
    monkeypatch.setattr(run, "TRIALS", trials)
    assert list(run.run(tmp_path)) == [
        Outcome("F0", "it is so", None, None, "there is no cable"),
        Outcome(
            "F1",
            "it is so",
            None,
            False,
            "AttributeError: module 'torch' has no attribute 'nn' (test_self_test.py:34)",
        ),
        Outcome("F2", "it is so", True, False),
    ]


def test_a_package_that_is_missing_is_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotTried, match=r"^no_such_package is not installed$"):
        outcome.need("no_such_package")
    outcome.need("json")


def test_what_is_refused_is_told_by_its_class() -> None:
    def too_large() -> None:
        raise DoesNotFit("too large", failure_class="F20")

    error = DoesNotFit("on meta", failure_class="F1")
    checks = (Check("forward", "fail", 0, 0.0, error), Check("F2", "pass", 3, 0.0))
    certificate = Certificate(checks, "now", {}, 0)
    assert outcome.refused(too_large) == {"F20"}
    assert outcome.refused(lambda: certificate) == {"forward", "F1"}
    assert outcome.refused(lambda: None) == set()


def test_the_lines_are_json(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As the command reads them."""
    for name in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(run.transformers_logging, name, lambda: None)
    for module, name in ((run.logging, "disable"), (run.warnings, "simplefilter")):
        monkeypatch.setattr(module, name, lambda *args: None)
    monkeypatch.setattr(run.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(run, "TRIALS", [Trial("F9", "it is so", fine)])
    run.main()
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "failure_class": "F9",
        "what": "it is so",
        "there": True,
        "caught": False,
        "why": None,
    }
