"""`moorage plugins`: what was found, what is broken, what can be set."""

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.conftest import as_json

SOUND = '''"""Mine, for the odd machine."""

from pydantic import BaseModel, Field

from service.placement.hookspecs import hookimpl

DEFAULTS = {"quantize": "nf4"}


class Options(BaseModel):
    layers: int = Field(description="First layers on the CPU.")
    mode: str = Field("fast", description="How.")


@hookimpl
def load(config, placement): ...


@hookimpl
def validate(model, placement): ...


@hookimpl
def place_inputs(model, inputs): ...
'''


@pytest.fixture
def strategies(tmp_path: Path) -> Path:
    """A config whose `strategy_dirs` has one sound and one broken strategy."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_own.py").write_text(SOUND)
    (tmp_path / "mine" / "cracked.py").write_text("import tritonx\n")
    (tmp_path / "moorage.yaml").write_text(
        "version: 1\ndeployments:\n  a:\n    strategy_dirs: [./mine]\n"
    )
    return tmp_path


def test_the_built_in_strategies_are_listed_with_their_first_line(run: Run) -> None:
    result = run("plugins", "list")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert {"auto-shard", "cpu", "four-bit", "single-gpu"} <= set(lines)
    assert "plugins/cpu.py" in lines["cpu"]
    assert "The whole model in RAM, computed by the CPU." in lines["cpu"]


def test_a_broken_strategy_is_listed_with_its_error(run: Run, strategies: Path) -> None:
    result = run("plugins", "list")
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if line.startswith("cracked"))
    assert "broken" in line
    assert "No module named 'tritonx' (cracked.py:1)" in line
    assert "my-own" in result.stdout


def test_the_list_as_json_separates_sound_and_broken(run: Run, strategies: Path) -> None:
    listed = as_json(run("plugins", "list", "--json"))
    mine = next(s for s in listed["strategies"] if s["name"] == "my-own")
    assert mine["summary"] == "Mine, for the odd machine."
    assert mine["defaults"] == {"quantize": "nf4"}
    assert mine["options"]["properties"]["mode"]["default"] == "fast"
    assert [b["name"] for b in listed["broken"]] == ["cracked"]
    assert listed["broken"][0]["error"]["code"] == "plugin_error"


def test_show_says_options_types_defaults_and_own_defaults(run: Run, strategies: Path) -> None:
    result = run("plugins", "show", "my-own")
    assert result.exit_code == 0
    cells = [line.split() for line in result.stdout.splitlines()]
    assert ["layers", "integer", "(required)", "First", "layers", "on", "the", "CPU."] in cells
    assert ["mode", "string", "fast", "How."] in cells
    assert ["quantize", "nf4"] in cells
    assert as_json(run("plugins", "show", "my-own", "--json"))["name"] == "my-own"


def test_showing_a_broken_strategy_fails_with_7(run: Run, strategies: Path) -> None:
    result = run("plugins", "show", "cracked")
    assert result.exit_code == 7
    assert "tritonx" in result.stderr


def test_showing_an_unknown_strategy_suggests(run: Run) -> None:
    result = run("plugins", "show", "auto-shart")
    assert result.exit_code == 2
    assert "'auto-shard'" in result.stderr


def test_a_mistake_in_the_config_is_a_config_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "moorage.yaml").write_text("version: 1\ndeployments:\n  a:\n    strategey: x\n")
    result = run("plugins", "list")
    assert result.exit_code == 3
    assert "moorage.yaml:4:5" in result.stderr


# --- check: what the contract is, tests/testing has


FAULTY = """
from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from service.placement.hookspecs import hookimpl


@hookimpl
def validate(model, placement): ...
"""


def test_check_prints_a_table_and_ends_with_7_if_anything_fails(run: Run, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    result = run("plugins", "check", "faulty.py")
    assert result.exit_code == 7
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["CHECK", "RESULT", "MESSAGE"]
    (failed,) = (line for line in lines if " fail " in line)
    assert failed.startswith("validate-rejects-faults")
    assert "(validate, faulty.py:9)" in failed
    assert lines[-1] == "14 passed, 1 failed, 0 not run"
    assert result.stderr == ""


def test_check_takes_a_strategy_of_the_config_with_what_flags_say(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    options = "class Options(BaseModel):\n    layers: int\n    pack: str = 'off'\n"
    (tmp_path / "mine" / "faulty.py").write_text(
        f"from pydantic import BaseModel\n{FAULTY}\n\n{options}"
    )
    (tmp_path / "moorage.yaml").write_text(
        "version: 1\ndeployments:\n  a:\n    strategy_dirs: [./mine]\n    quantize: nf4\n"
    )
    untold = as_json(run("plugins", "check", "faulty", "--json"))
    assert "options are needed" in untold["checks"][1]["message"]
    words = ("--set", "options.layers=1", "--set", "quantize=int8", "--json")
    told = as_json(run("plugins", "check", "faulty", *words))
    by_name = {check["check"]: check for check in told["checks"]}
    assert by_name["plan-reads-no-weights"]["status"] == "pass"
    assert "0.98 is needed" in by_name["forward-equals-reference"]["message"]
    assert not told["passed"]


def test_check_of_a_strategy_that_cannot_be_imported_fails_with_its_line(
    run: Run, strategies: Path
) -> None:
    for words in ("cracked", "mine/cracked.py"):
        result = run("plugins", "check", words)
        assert result.exit_code == 7
        assert "No module named 'tritonx' (cracked.py:1)" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("auto-shart",), "did you mean 'auto-shard'"),
        (("nowhere.py",), "there is no file nowhere.py"),
        (("cpu", "--set", "model=x"), "model cannot be set"),
    ],
)
def test_check_refuses_what_it_cannot_check(run: Run, words: tuple[str, ...], said: str) -> None:
    result = run("plugins", "check", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
