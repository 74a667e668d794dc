"""What contributors are given works: the hooks before a commit, the forms of an issue, the pages
made from code.
"""

import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from service import __version__

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# docs.github.com, "Syntax for GitHub's form schema": attributes of each kind of field
ATTRIBUTES = {
    "markdown": {"value"},
    "input": {"label", "description", "placeholder", "value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
}


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path)


def hooks() -> dict[str, Any]:
    [repository] = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    return {hook["id"]: hook for hook in repository["hooks"]}


def run(hook: dict[str, Any], *files: Path) -> int:
    """Its exit status, with the tools that these tests run with."""
    assert hook["language"] == "system"
    program, *arguments = shlex.split(hook["entry"])
    tool = Path(sysconfig.get_path("scripts"), Path(program).name)
    assert program == f".venv/bin/{tool.name}"
    return subprocess.run([tool, *arguments, *files], cwd=ROOT, capture_output=True).returncode


@pytest.mark.parametrize("name", ["ruff-check", "ruff-format"])
def test_a_hook_lets_good_files_pass_and_stops_others(name: str, tmp_path: Path):
    bad = tmp_path / "bad.py"
    bad.write_text("import os;x  =  1\n")
    assert run(hooks()[name], Path(__file__)) == 0
    assert run(hooks()[name], Path(__file__), bad) == 1


def test_the_hooks_run_what_make_runs():
    recipes = re.findall(r"^\t\$\(BIN\)/(ruff [a-z]+|mypy)", MAKEFILE, re.MULTILINE)
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks().values()]
    assert [" ".join(entry.split()[:2]) for entry in entries] == recipes
    # all of it, not file by file: a change of one file is an error in another
    assert hooks()["mypy"]["pass_filenames"] is False


def test_a_form_has_its_keys_and_fields(subtests: pytest.Subtests):
    forms = [path for path in FORMS if path.name != "config.yml"]
    assert {path.stem for path in forms} == {"bug", "placement", "strategy"}
    for path in forms:
        form = read(path)
        with subtests.test(path.name):
            assert form.keys() <= {"name", "description", "title", "labels", "body"}
            assert form["name"]
            assert form["description"]
            fields = [field for field in form["body"] if field["type"] != "markdown"]
            labels = [field["attributes"]["label"] for field in fields]
            ids = [field["id"] for field in fields]
            assert len(set(ids)) == len(set(labels)) == len(fields) > 0
            assert all(re.fullmatch(r"[\w-]+", name) for name in ids)
            assert any("`moorage doctor" in label for label in labels)
            for field in form["body"]:
                assert field.keys() <= {"type", "id", "attributes", "validations"}
                assert field["attributes"].keys() <= ATTRIBUTES[field["type"]]
                assert field.get("validations", {}).keys() <= {"required"}


def test_every_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z]+)", CONTRIBUTING, re.MULTILINE)
    releasing = (ROOT / "docs" / "releasing.md").read_text(encoding="utf-8")
    named += re.findall(r"`make ([a-z]+)", releasing)
    assert {"check", "test", "reference"} <= set(named) <= targets


def test_every_folder_that_is_named_exists():
    for folder in re.findall(r"`(tests/[\w/]+/|tests/[\w/.]+\.py)`", CONTRIBUTING):
        assert (ROOT / folder).exists(), folder


def test_make_reference_finds_every_page_that_is_made():
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", "reference"], cwd=ROOT, capture_output=True
    )
    assert made.returncode == 0
    [pattern] = re.findall(r"grep -rhoP '(.*?)' docs", made.stdout.decode())
    found = subprocess.run(
        ["grep", "-rhoP", pattern, "docs"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    assert "-m service.config.reference > docs/config.md" in found
    for line in found:
        assert re.fullmatch(r"-m service(\.\w+)+ > docs/[\w/]+\.md", line), line


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == __version__
