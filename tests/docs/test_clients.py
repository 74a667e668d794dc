"""docs/clients.md shows the very scripts, and lists what they show with the versions they pin."""

import re
from pathlib import Path

import pytest

from tests.clients import run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
FILES = [path for path in run.HERE.rglob("*") if path.suffix in {".py", ".mjs", ".yaml", ".json"}]


def row(name: str) -> list[str]:
    """The cells of a client's row: its name, its version, what its script shows."""
    found = re.search(rf"^\| \[{re.escape(name)}\](.*)$", PAGE, re.MULTILINE)
    assert found, f"docs/clients.md lacks {name}"
    return [cell.strip() for cell in found[1].strip("|").split("|")]


def test_every_script_is_a_client_of_the_runner():
    scripts = {path for path in run.HERE.iterdir() if path.name.startswith("use_")}
    assert scripts == {run.script(name) for name in run.CLIENTS}
    pins = set(run.HERE.glob("requirements-*.txt")) | {run.HERE / "package.json"}
    assert pins == {run.requirements(name) for name in run.CLIENTS}


@pytest.mark.parametrize("name", run.CLIENTS)
def test_the_page_has_its_version_and_what_its_script_shows(name: str):
    _, version, shows = row(name)
    assert version == run.version(name)
    text = run.script(name).read_text(encoding="utf-8")
    printed = re.findall(r'^ *(?:print|console\.log)\("([^"]+)"\)', text, re.MULTILINE)
    assert shows == ", ".join(printed)


@pytest.mark.parametrize("name", run.CLIENTS)
def test_its_requirements_are_exact(name: str):
    text = run.requirements(name).read_text()
    if name in run.NODE:
        pins = re.findall(r'^    "[\w@/.-]+": "(.*)"', text, re.MULTILINE)
        assert all(re.fullmatch(r"\d+\.\d+\.\d+", pin) for pin in pins)
    else:
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), lines


@pytest.mark.parametrize("block", re.findall(r"```(?:python|js|yaml)\n(.*?)```", PAGE, re.DOTALL))
def test_what_the_page_shows_is_in_a_script(block: str):
    assert any(block in path.read_text(encoding="utf-8") for path in FILES), block


def test_its_command_is_a_target_of_the_makefile():
    (command,) = re.findall(r"^make (\w+)", PAGE, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{command}:.*\n\t.*tests\.clients\.run", makefile, re.MULTILINE)
    for name in re.findall(r'CLIENTS="([^"]*)"', PAGE)[0].split():
        assert name in run.CLIENTS
