"""Each way to break the contract is caught by the check that is for it, which says where."""

from pathlib import Path

import pytest

from service.placement import guard
from service.testing.examining import Result
from service.testing.examining import examine

pytestmark = pytest.mark.usefixtures("forked_simulations")
FOLDER = Path(__file__).parent / "wrong_strategies"
# file -> the check that catches it, and what its message has beside the place
WRONG = {
    "imports_a_missing_package": ("is-a-strategy", "No module named 'tritonx'"),
    "imports_torch": ("imports-lightly", "it imports torch"),
    "reads_weights_in_plan": ("plan-reads-no-weights", "plan calls safetensors.torch.load_file"),
    "needs_weights_in_plan": (
        "plan-reads-no-weights",
        "fails where there is config.json only",
    ),
    "asks_the_environment_in_plan": (
        "plan-depends-on-its-arguments",
        "plan looks at the variable MY_DEVICE",
    ),
    "counts_its_plans": ("plan-depends-on-its-arguments", "notes differ"),
    "crashes_on_an_empty_machine": ("refuses-an-empty-machine", "ZeroDivisionError"),
    "leaves_the_head_on_meta": ("load-leaves-nothing-on-meta", "lm_head.weight was left on meta"),
    "forgets_tie_weights": ("load-restores-globals", "PreTrainedModel.tie_weights swapped out"),
    "offloads_silently": ("declares-offload", "are offloaded and the plan does not say so"),
    "accepts_everything": (
        "validate-rejects-faults",
        "validate accepts a model of which lm_head.weight is on meta",
    ),
    "looks_at_parameters_only": (
        "validate-rejects-faults",
        "validate accepts a model of which model.rotary_emb.inv_freq is on meta",
    ),
    "refuses_everything": ("validate-accepts-the-model", "the model was not dispatched"),
    "inputs_lose_a_key": ("place-inputs-keeps-inputs", "returned ['input_ids'] for inputs"),
    "inputs_become_int32": ("place-inputs-keeps-inputs", "torch.int32 for input_ids"),
    "inputs_change_their_argument": (
        "place-inputs-keeps-inputs",
        "changed its argument: position_ids",
    ),
    "inputs_on_meta": ("place-inputs-keeps-inputs", "put input_ids on meta"),
    "keeps_the_model": ("release-lets-the-model-die", "KEPT in keeps_the_model.py holds it"),
    "tied_head_on_the_last_card": (
        "works-on-simulated-accelerators",
        "lm_head.weight on cuda:1 and model.embed_tokens.weight on cuda:0 are one tensor (F8)",
    ),
    "forgets_the_norm_on_cards": (
        "works-on-simulated-accelerators",
        "does not give any device for the following parameters: model.norm.weight",
    ),
    "inputs_to_the_last_card": (
        "works-on-simulated-accelerators",
        "place_inputs put input_ids on cuda:1; inputs belong on cuda:0 (F7)",
    ),
    "scales_a_weight": ("forward-equals-reference", "of the largest one away"),
}
# where the message says it all
PLAIN = {"counts_its_plans", "refuses_everything", "scales_a_weight"}
# the certificate comes after the single checks, and what they find it may find too
GENERAL = "is-certified"


def place(path: Path) -> str:
    """The line that is marked as wrong: "mine.py:12"; or the file, if it is no single line."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.endswith("# wrong"):
            return f"{path.name}:{number})"
    return path.name


def failed(results: list[Result]) -> dict[str, str]:
    return {result.check: result.message for result in results if result.status == "fail"}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_caught_by_its_check_with_its_place(name: str, tmp_path: Path):
    check, said = WRONG[name]
    path = FOLDER / f"{name}.py"
    found = failed(examine(str(path), tmp_path))
    assert found.keys() - {GENERAL} == {check}
    assert said in found[check]
    assert place(path) in found[check]
    assert ("  fix: " in found[check]) == (name not in PLAIN)
    assert guard.findings() == []


def test_none_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(WRONG)
    assert len(WRONG) >= 12
