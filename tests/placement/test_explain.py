"""`moorage plan` in data: what fits, and what would, which then really does."""

import re
from pathlib import Path
from typing import Any

import pytest

from service.errors import PlacementUnavailable
from service.placement import hardware
from service.placement import registry
from service.placement.alternatives import Alternative
from service.placement.explain import PlanReport
from service.placement.explain import explain
from service.placement.explain import short
from service.placement.hardware import Hardware
from service.placement.plan import Placement
from service.placement.plan import Unit
from service.placement.plan import runs
from tests.support.planned import GIB
from tests.support.planned import LLAMA_70B
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.planned import write_shape

RIG = {"strategy": "auto-shard", "max_context": 8192, "max_sequences": 2}
TWO_24 = hardware.invent("2x24GiB,ram=200GiB")


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape(tmp_path_factory.mktemp("shapes") / "llama-70b", **LLAMA_70B)


@pytest.fixture(scope="module")
def refused(llama_70b: Path) -> PlanReport:
    """70B unquantised on two 24 GiB cards."""
    return explained(llama_70b, TWO_24)


def explained(folder: Path, machine: Hardware, **changes: Any) -> PlanReport:
    found = registry.build()
    config = model_config(folder, **{**RIG, **changes})
    return explain(config, found.select(config.strategy), machine, found)


def planned_as_told(folder: Path, alternative: Alternative) -> Placement:
    """The plan with what the alternative says to type, or on the machine it names."""
    words = {**RIG}
    for key, value in re.findall(r"--set (\w+)=(\S+)", alternative.flag):
        words[key] = int(value) if value.isdigit() else value
    for value in re.findall(r"--strategy (\S+)", alternative.flag):
        words["strategy"] = value
    machine = TWO_24
    if other := re.search(r"on (\d+) x (\d+) GiB", alternative.what):
        machine = hardware.invent(f"{other[1]}x{other[2]}GiB")
    strategy = registry.build().select(str(words["strategy"]))
    return strategy.plan(model_config(folder, **words), machine)


def test_a_plan_that_fits_says_what_is_left_on_every_device(llama_70b: Path):
    made = explained(llama_70b, TWO_24, quantize="nf4")
    assert made.error is None
    assert [device.id for device in made.devices] == ["cuda:0", "cuda:1", "cpu"]
    for device in made.devices[:2]:
        assert device.left == device.free - device.planned.total > 0
    assert made.devices[0].modules == (("embed_tokens", 1), ("layers.0-39", 40))
    assert dict(made.devices[1].modules)["layers.40-79"] == 40
    assert made.devices[2].planned.total == 0


def test_the_room_for_kv_can_be_used(llama_70b: Path):
    """As many sequences as the room has full contexts fit, and one more does not."""
    made = explained(llama_70b, TWO_24, quantize="nf4")
    most = made.room_tokens // 8192
    assert most == 2
    assert explained(llama_70b, TWO_24, quantize="nf4", max_sequences=most).placement
    assert explained(llama_70b, TWO_24, quantize="nf4", max_sequences=most + 1).error


def test_a_model_that_does_not_fit_is_a_report(refused: PlanReport):
    assert refused.placement is None
    assert refused.error is not None
    assert refused.error.exit_status == 4
    assert re.search(r"9\d\.\d GiB short \(F20\)", refused.error.message)


def test_the_alternatives_include_nf4(refused: PlanReport):
    assert "--set quantize=nf4" in [alternative.flag for alternative in refused.alternatives]


def test_every_alternative_fits_when_it_is_planned(llama_70b: Path, refused: PlanReport):
    assert len(refused.alternatives) >= 3
    for alternative in refused.alternatives:
        made = planned_as_told(llama_70b, alternative)
        assert sum(memory.weights for memory in made.memory.values()) == alternative.weights
        assert min(alternative.left) >= 0


def test_what_does_not_help_is_not_offered(refused: PlanReport):
    """A shorter context frees 5 GiB of the 90 that are missing; int8 is 72 GiB."""
    flags = [alternative.flag for alternative in refused.alternatives]
    assert not any("max_context" in flag or "int8" in flag for flag in flags)


def test_it_says_what_a_plain_load_would_have_done(refused: PlanReport):
    (note,) = refused.notes
    assert note.startswith('Left to itself, device_map="auto" would put layers 0')
    assert re.search(r"every token would then read \d+\.\d GiB over PCIe", note)


def test_on_a_machine_without_cards_larger_ram_is_offered(llama_70b: Path):
    made = explained(llama_70b, ram(64 * GIB), strategy="cpu")
    assert made.error is not None
    whats = [alternative.what for alternative in made.alternatives]
    assert "bfloat16 on 256 GiB of RAM" in whats
    assert "4-bit nf4, double quant." in whats


def test_a_context_that_does_not_fit_is_offered_shorter(llama_70b: Path):
    """The longest that fits with one sequence: 256 tokens more do not."""
    machine = hardware.invent("2x80GiB")
    made = explained(llama_70b, machine, max_context=131_072, max_sequences=4)
    (shorter,) = [
        a for a in made.alternatives if a.what.endswith("tokens of context, one sequence")
    ]
    context = int(re.findall(r"max_context=(\d+)", shorter.flag)[0])
    assert "max_sequences=1" in shorter.flag
    assert explained(llama_70b, machine, max_context=context, max_sequences=1).placement
    assert explained(llama_70b, machine, max_context=context + 256, max_sequences=1).error


def test_what_is_lost_least_is_offered_first(llama_70b: Path):
    """Half of the sequences, then 8 bits, then 4, then speed, then money."""
    made = explained(llama_70b, hardware.invent("2x80GiB,ram=200GiB"), max_context=65_536)
    assert [a.flag for a in made.alternatives] == [
        "--set max_sequences=1",
        "--set quantize=int8",
        "--set quantize=nf4",
        "--strategy auto-shard --set on_no_fit=offload-cpu",
        "--strategy cpu",
        "(other hardware)",
    ]


def test_a_strategy_is_offered_what_it_can_do_only(llama_70b: Path):
    """four-bit has no other format, and single-gpu no second card but auto-shard has."""
    made = explained(llama_70b, hardware.invent("24GiB"), strategy="four-bit", quantize="nf4")
    assert not any("quantize" in alternative.flag for alternative in made.alternatives)
    alone = explained(llama_70b, hardware.invent("2x80GiB"), strategy="single-gpu")
    assert alone.alternatives[0].flag == "--strategy auto-shard"


def test_a_budget_of_tokens_shrinks_with_the_context(llama_70b: Path):
    """kv_tokens may not be less than max_context, nor more than before."""
    machine = hardware.invent("2x80GiB")
    asked = {"max_context": 131_072, "max_sequences": 4, "kv_tokens": 200_000}
    made = explained(llama_70b, machine, **asked)
    (shorter,) = [a for a in made.alternatives if "tokens of context" in a.what]
    keys = dict(re.findall(r"(\w+)=(\d+)", shorter.flag))
    assert keys["kv_tokens"] == keys["max_context"]
    numbers = {key: int(value) for key, value in keys.items()}
    assert explained(llama_70b, machine, **{**asked, **numbers}).placement


def test_a_missing_device_is_not_a_report(llama_70b: Path):
    with pytest.raises(PlacementUnavailable, match="F19"):
        explained(llama_70b, ram(GIB), strategy="single-gpu")


def test_where_a_weights_only_map_would_overflow_is_said(tmp_path: Path):
    """A larger last card: accelerate fills the first by weights alone, and its KV does not fit."""
    folder = write_shape(tmp_path, **{**LLAMA_70B, "num_hidden_layers": 16})
    machine = cards(13 * GIB, 40 * GIB)
    little = explained(folder, machine, max_context=1024)
    assert little.placement is not None
    much = explained(folder, machine, max_context=32_768, max_sequences=6)
    assert much.placement is not None
    notes = [[n for n in made.notes if "would overflow" in n] for made in (little, much)]
    assert notes[0] == []
    assert re.match(r"accelerate's balanced map \(\d+/\d+ layers\) would overflow", notes[1][0])


def test_neighbours_are_written_as_one():
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in (0, 1, 2, 5)), "lm_head"]
    found = runs(Unit(name, 1) for name in names)
    assert [(short(group), group.count) for group in found] == [
        ("embed_tokens", 1),
        ("layers.0-2", 3),
        ("layers.5", 1),
        ("lm_head", 1),
    ]
