"""How a strategy is found for examination, wherever it comes from, and what is said about it."""

import sys
from pathlib import Path

import pytest

from service.errors import PluginError
from service.testing import case as cases
from service.testing import contract
from service.testing.case import Case
from service.testing.machines import cards
from service.testing.machines import empty
from tests.support.planned import GIB
from tests.support.planned import STRATEGY

PILOT = STRATEGY.replace(
    "@hookimpl\ndef validate",
    "@hookimpl\ndef plan(config, hardware):\n"
    "    import os\n\n"
    "    from service.placement import planning\n\n"
    '    return planning.on_one_device(config, hardware, os.environ.get("PILOT", "cpu"))\n\n\n'
    "@hookimpl\ndef validate",
)
CLASS = '''
import torch

from service.placement.hookspecs import hookimpl


class Pilot:
    """As an object."""

    @hookimpl
    def load(self, config, placement):
        self.model = torch.nn.Linear(1, 1)

    @hookimpl
    def validate(self, model, placement): ...

    @hookimpl
    def place_inputs(self, model, inputs): ...


pilot = Pilot()
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two strategies as `pip install` leaves them: a module, and an object in a package."""
    site = tmp_path / "site"
    info = site / "harbour-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: harbour\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[moorage.strategies]\npilot = harbour\nobject = harbour_objects:pilot\n"
    )
    (site / "harbour.py").write_text(PILOT)
    (site / "harbour_objects").mkdir()
    (site / "harbour_objects" / "__init__.py").write_text(CLASS)
    monkeypatch.syspath_prepend(str(site))
    for name in ("harbour", "harbour_objects"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return site


def test_an_installed_strategy_is_imported_again_in_another_process(
    installed: Path, tmp_path: Path
):
    sound = Case(cases.find("pilot"), tmp_path)
    assert contract.imports_lightly(sound) == "harbour: harbour"
    with pytest.raises(PluginError, match=r"it imports torch \(__init__\.py:2\)"):
        contract.imports_lightly(Case(cases.find("object"), tmp_path))


def test_the_lines_of_an_installed_strategy_are_its_authors(installed: Path, tmp_path: Path):
    with pytest.raises(PluginError, match=r"the variable PILOT \(harbour\.py:\d+\); it may look"):
        contract.plan_depends_on_its_arguments(Case(cases.find("pilot"), tmp_path))


def test_a_hook_is_told_by_the_line_of_its_def(installed: Path, tmp_path: Path):
    case = Case(cases.find("object"), tmp_path)
    line = CLASS.splitlines().index("    def validate(self, model, placement): ...") + 1
    assert case.at("validate") == f"validate, __init__.py:{line}"
    assert case.at("release") == "release, harbour: harbour_objects:pilot"


def test_a_built_in_may_be_given_as_its_file():
    file = Path(cases.__file__).parents[2] / "plugins" / "auto_shard.py"
    assert cases.find(str(file)).name == "auto-shard"


@pytest.mark.parametrize(
    ("name", "said"), [("cpux", "did you mean 'cpu'"), ("there/is/none.py", "there is no file")]
)
def test_what_is_not_there_is_said(name: str, said: str):
    with pytest.raises(cases.UnknownStrategy, match=said):
        cases.find(name)


def test_a_strategy_that_never_works_is_not_taken_for_one_that_needs_another_machine(
    tmp_path: Path,
):
    (tmp_path / "never.py").write_text(
        STRATEGY + "\n\n@hookimpl\ndef plan(config, hardware):\n"
        "    from service.errors import PlacementUnavailable\n\n"
        '    raise PlacementUnavailable("not today", hint="tomorrow")\n'
    )
    case = Case(cases.find(str(tmp_path / "never.py")), tmp_path)
    with pytest.raises(PluginError, match="plan refuses this machine, one with two GPUs"):
        contract.plan_reads_no_weights(case)


def test_a_load_that_raises_fails_one_check_and_the_others_are_not_run(tmp_path: Path):
    text = STRATEGY.replace(
        "    from transformers", '    raise ValueError("no")\n    from transfor'
    )
    (tmp_path / "fails.py").write_text(text)
    case = Case(cases.find(str(tmp_path / "fails.py")), tmp_path)
    with pytest.raises(PluginError, match=r"load raised ValueError: no \(fails\.py:\d+\)"):
        contract.load_returns_a_model(case)
    for check in (contract.forward_equals_reference, contract.release_lets_the_model_die):
        with pytest.raises(cases.NotRun, match="see load-returns-a-model"):
            check(case)


def test_a_machine_without_what_it_needs_is_no_fault_of_the_strategy(tmp_path: Path):
    case = Case(cases.find("cpu"), tmp_path, hardware=empty())
    assert contract.plan_reads_no_weights(case).startswith("cpu: ")
    with pytest.raises(cases.NotRun, match="not on this machine"):
        contract.load_returns_a_model(case)


def test_invented_cards_are_numbered_in_order():
    assert [gpu.id for gpu in cards(GIB, 2 * GIB).gpus] == ["cuda:0", "cuda:1"]
