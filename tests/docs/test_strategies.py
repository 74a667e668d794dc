"""docs/strategies.md says what the code does, and its examples run.

On a difference, paste what the failing test shows.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.placement import checks
from service.placement import finding
from service.placement import hookspecs
from service.placement import planning
from service.placement import registry
from service.testing import contract

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "strategies.md").read_text(encoding="utf-8")
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FIRST = CODE.findall((DOCS / "plugin-guide.md").read_text(encoding="utf-8"))[0]


def refused(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(text)
    error = registry.build([folder]).broken["mine"].one_line()
    return error.replace(str(folder), "strategies")


# --- what is said about the contract


def hook(name: str) -> str:
    """The section of one hook, as the page must have it."""
    specification = getattr(hookspecs, name)
    signature = str(inspect.signature(specification)).replace("'", "").replace('"', "")
    return f"### {name}\n\n```text\n{name}{signature}\n\n{inspect.getdoc(specification)}\n```\n"


@pytest.mark.parametrize("name", finding.HOOKS)
def test_every_hook_and_its_arguments_are_documented(name: str):
    assert hook(name) in PAGE


def test_every_check_of_the_certificate_is_documented():
    rows = ["| check | what it proves |", "| --- | --- |"]
    for name, check in checks.CHECKS:
        said = (inspect.getdoc(check) or "").partition("\n\n")[0]
        rows.append(f"| {name} | {' '.join(said.removeprefix(f'{name}: ').split())} |")
    assert "\n".join(rows) in PAGE


def test_every_check_of_the_contract_is_documented():
    rows = ["| check | what it proves |", "| --- | --- |"]
    for name, check in contract.CHECKS:
        rows.append(f"| {name} | {' '.join((inspect.getdoc(check) or '').split())} |")
    assert "\n".join(rows) in PAGE


def test_every_tolerance_is_documented():
    text = " ".join(PAGE.split())
    by = contract.ALIKE
    assert f"{contract.EXACT:.0e}".replace("e-0", "e-") + " of the largest one away" in text
    assert by["bfloat16"] == by["float16"]
    assert (
        f"by {by['bfloat16']} in bfloat16 or float16, {by['Linear8bitLt']} in int8 and "
        f"{by['Linear4bit']} in 4 bits"
    ) in text


@pytest.mark.parametrize("helper", ["on_one_device", "spread", "mapped", "units", "modules"])
def test_every_planning_helper_is_documented(helper: str):
    said = " ".join((inspect.getdoc(getattr(planning, helper)) or "").partition("\n\n")[0].split())
    assert f"| `planning.{helper}" in PAGE
    assert said in PAGE


def test_the_keys_that_cannot_be_defaults_are_listed():
    listed = re.search(r"All keys of a deployment but (.*?):", PAGE, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == finding.DECIDED_BEFORE


# --- the examples


def test_the_example_of_a_test_runs_every_check(tmp_path: Path):
    (tmp_path / "mine.py").write_text(FIRST)
    (tests,) = CODE.findall(PAGE)
    (tmp_path / "test_mine.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path / "test_mine.py"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{len(contract.CHECKS)} passed" in done.stdout, done.stdout + done.stderr


def test_the_page_names_the_real_group():
    assert f"`{hookspecs.ENTRY_POINT_GROUP}`" in PAGE


# --- the messages


@pytest.mark.parametrize(
    "text",
    [
        FIRST.replace("@hookimpl\ndef load", "@hookimpl\ndef laod"),
        FIRST.replace("def load(config, placement)", "def load(config, placment)"),
        FIRST.replace("def load(config, placement)", "def load(config, placement=None)"),
        FIRST.replace("@hookimpl\ndef load", "def load"),
        FIRST.partition("@hookimpl\ndef place_inputs")[0],
        "import tritonx\n" + FIRST,
        FIRST + 'Options = {"layers": 1}\n',
        FIRST + 'DEFAULTS = {"quantise": "nf4"}\n',
        FIRST + 'NAME = "cpu"\n',
    ],
    ids=[
        "misspelt hook",
        "misspelt argument",
        "default",
        "no mark",
        "missing hook",
        "import",
        "Options",
        "DEFAULTS",
        "two of a name",
    ],
)
def test_every_message_is_documented_as_it_is_said(tmp_path: Path, text: str):
    folder = tmp_path / "strategies"
    if 'NAME = "cpu"' in text:
        folder.mkdir()
        (folder / "mine.py").write_text(text)
        said = registry.build([folder]).broken["cpu"].one_line().replace(str(folder), "strategies")
    else:
        said = refused(folder, text)
    message = said.partition("  fix: ")[0]
    assert f"| `{message}` |" in PAGE, f"the page lacks: {said}"
