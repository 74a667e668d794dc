"""The chain: what is tried in which order, with which words, and what an attempt may not leave."""

from pathlib import Path
from typing import Any

import pytest

from service.config.origin import Origin
from tests.deployment.conftest import Make
from tests.deployment.conftest import answer
from tests.deployment.faults import FAULTS
from tests.deployment.strategies import KEEPING
from tests.deployment.strategies import RELEASING
from tests.deployment.strategies import beside
from tests.deployment.strategies import load_then
from tests.deployment.strategies import write
from tests.support.placing import planned

NF4 = {"strategy": "cpu", "quantize": "nf4"}


def test_when_every_strategy_fails_each_attempt_is_told_and_the_last_is_the_error(
    make: Make, tmp_path: Path
) -> None:
    names = ["load-raises", "imports-what-is-not-there", "head-on-meta"]
    for name in names:
        write(tmp_path / "strategies", name, FAULTS[name].hooks)
    deployment = make(names[0], fallback=tuple(names[1:])).settle()
    attempts = deployment.document()["attempts"]
    assert [attempt["strategy"] for attempt in attempts] == names
    assert deployment.error is not None
    assert deployment.error.failure_class == "F1"


def test_an_unknown_fallback_is_refused_before_anything_is_loaded(make: Make) -> None:
    deployment = make(fallback=("cppu",)).settle()
    assert deployment.state == "failed"
    assert deployment.error is not None
    assert "fallback[0]: unknown strategy 'cppu'; did you mean 'cpu'?" in deployment.error.message
    assert deployment.document()["devices"] == []


def test_a_fallback_that_is_broken_is_told_although_nobody_needs_it(
    make: Make, tmp_path: Path
) -> None:
    name = "imports-what-is-not-there"
    write(tmp_path / "strategies", name, FAULTS[name].hooks)
    deployment = make("cpu", fallback=(name,)).settle()
    document = deployment.document()
    assert (document["state"], document["attempts"]) == ("ready", [])
    told = f"cannot fall back: strategy {name} failed to import: No module named 'tritonx'"
    assert any(warning.startswith(told) for warning in document["warnings"])


def test_a_broken_strategy_alone_is_told_before_the_model_is_looked_for(
    make: Make, tmp_path: Path
) -> None:
    name = "imports-what-is-not-there"
    write(tmp_path / "strategies", name, FAULTS[name].hooks)
    deployment = make(name, model=str(tmp_path / "nowhere")).settle()
    assert deployment.error is not None
    assert deployment.error.code == "plugin_error"


def test_a_model_that_is_not_there_fails(make: Make, tmp_path: Path) -> None:
    deployment = make(model=str(tmp_path / "nowhere"), fallback=("auto-shard",)).settle()
    assert deployment.error is not None
    assert deployment.error.code == "model_unavailable"
    assert "nowhere" in deployment.error.message
    assert deployment.document()["attempts"] == []


def test_an_accelerator_that_is_not_there_falls_back_to_what_is(make: Make) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    deployment = make("single-gpu", fallback=("auto-shard",)).settle()
    document = deployment.document()
    assert document["strategy"]["name"] == "auto-shard"
    assert document["attempts"][0]["error"]["failure_class"] == "F19"


# --- steps with words of their own


def test_a_step_with_smaller_weights_serves_what_did_not_fit(make: Make, model: Path) -> None:
    sizes = [
        planned(model, max_sequences=2, quantize=quantize).memory["cpu"].total
        for quantize in ("none", "nf4")
    ]
    between = sum(sizes) // 2
    assert sizes[1] < between < sizes[0]
    deployment = make("cpu", max_memory={"cpu": between}, fallback=(NF4,)).settle()
    assert deployment.state == "ready", deployment.error
    document = deployment.document()
    assert document["model"]["quantize"] == "nf4"
    assert document["certificate"]["quantized_linears"] == 14
    [attempt] = document["attempts"]
    assert (attempt["strategy"], attempt["quantize"], attempt["stage"]) == ("cpu", "none", "plan")
    assert attempt["error"]["code"] == "does_not_fit"
    assert len(answer(deployment, [1, 2, 3])) == 4


def test_every_step_is_tried_with_its_own_words_and_told_with_them(
    make: Make, tmp_path: Path
) -> None:
    write(tmp_path / "strategies", "load-raises", FAULTS["load-raises"].hooks)
    steps: tuple[Any, ...] = (
        {"strategy": "load-raises", "quantize": "int8", "max_context": 48},
        {"strategy": "cpu", "quantize": "nf4", "max_context": 32, "max_sequences": 1},
        "auto-shard",
    )
    deployment = make("load-raises", fallback=steps).settle()
    document = deployment.document()
    tried = [(one["quantize"], one["max_context"]) for one in document["attempts"]]
    assert tried == [("none", 64), ("int8", 48)]
    assert document["strategy"]["name"] == "cpu"
    assert (document["model"]["quantize"], document["model"]["max_context"]) == ("nf4", 32)
    assert document["kv"]["planned_tokens"] == 32
    assert deployment.serving().max_context == 32


def test_the_origins_are_those_of_the_step_that_serves(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "load-raises", FAULTS["load-raises"].hooks)
    watched = make(
        "load-raises",
        fallback=(NF4,),
        origins={
            "strategy": Origin("file", "moorage.yaml", 7),
            "fallback": Origin("file", "moorage.yaml", 8),
            "fallback[0].strategy": Origin("file", "moorage.yaml", 9),
            "fallback[0].quantize": Origin("file", "moorage.yaml", 10),
        },
    )
    assert watched.settle().document()["origin"] == {
        "strategy": "moorage.yaml:9",
        "quantize": "moorage.yaml:10",
        "fallback": "moorage.yaml:8",
    }


def test_a_step_wins_over_the_defaults_of_its_strategy(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "load-raises", FAULTS["load-raises"].hooks)
    step = {"strategy": "four-bit", "quantize": "fp4"}
    deployment = make("load-raises", fallback=(step,)).settle()
    assert deployment.state == "ready", deployment.error
    assert deployment.document()["model"]["quantize"] == "fp4"


OPTIONS = """
from pydantic import BaseModel


class Options(BaseModel):
    broken: bool = False
"""


def test_options_are_for_every_step_with_the_strategy_they_were_written_for(
    make: Make, tmp_path: Path
) -> None:
    hooks = load_then("if config.options.broken and config.quantize == 'none':", "    return None")
    write(tmp_path / "strategies", "optional", hooks | beside(OPTIONS))
    steps: tuple[Any, ...] = ({"strategy": "optional", "quantize": "int8"}, "cpu")
    deployment = make("optional", options={"broken": True}, fallback=steps).settle()
    assert deployment.state == "ready", deployment.error
    document = deployment.document()
    assert (document["strategy"]["name"], document["model"]["quantize"]) == ("optional", "int8")
    assert [attempt["stage"] for attempt in document["attempts"]] == ["load"]


# --- each attempt begins clean (F21)

HOARDING = """
hoard = []


@hookimpl
def load(config, placement):
    import torch

    hoard.append(torch.zeros(20 * 2**20))  # 80 MiB
    raise OSError("the cable is out")
"""


def test_a_strategy_that_keeps_its_model_lets_no_other_begin(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "keeping", {"load": KEEPING})
    deployment = make("keeping", fallback=("cpu",)).settle()
    assert deployment.error is not None
    assert deployment.error.failure_class == "F21"
    [attempt] = deployment.document()["attempts"]
    assert attempt["error"]["failure_class"] == "F1"


def test_a_strategy_that_leaves_memory_behind_lets_no_other_begin(
    make: Make, tmp_path: Path
) -> None:
    write(tmp_path / "strategies", "hoarding", {"load": HOARDING})
    deployment = make("hoarding", fallback=("cpu",)).settle()
    assert deployment.error is not None
    assert "cpu still holds 80 MiB of a failed attempt (F21)" in deployment.error.message
    [attempt] = deployment.document()["attempts"]
    assert (attempt["strategy"], attempt["stage"]) == ("hoarding", "load")


def test_alone_it_is_told_of_its_own_fault(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "keeping", {"load": KEEPING})
    deployment = make("keeping").settle()
    assert deployment.error is not None
    assert deployment.error.failure_class == "F1"


def test_release_is_called_after_a_refused_certificate(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "releasing", {"load": KEEPING + RELEASING})
    deployment = make("releasing", fallback=("cpu",)).settle()
    assert deployment.state == "ready", deployment.error


def test_release_is_called_when_the_first_token_fails(make: Make, tmp_path: Path) -> None:
    hooks = dict(FAULTS["fails-at-the-first-token"].hooks)
    kept = "kept.append(model)\n    return model"
    hooks["load"] = "kept = []\n" + hooks["load"].replace("return model", kept) + RELEASING
    write(tmp_path / "strategies", "releasing", hooks)
    deployment = make("releasing", fallback=("cpu",)).settle()
    assert deployment.state == "ready", deployment.error
    assert [attempt["stage"] for attempt in deployment.document()["attempts"]] == ["start"]
