"""`moorage plugins new`: what it writes works at once, and what cannot be is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.config import reading
from service.config.flags import Flags
from tests.support.asked import asked
from tests.support.asked import plain_tokens
from tests.support.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "README.md",
    "last_light.py",
    "pyproject.toml",
    "setup.cfg",
    "test_last_light.py",
}


def new(*arguments: str) -> tuple[int, str]:
    """Status and words, without the box around them."""
    result = CliRunner().invoke(app, ["plugins", "new", *arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "last-light"
    status, said = new("last-light", "--into", str(folder))
    assert status == 0, said
    return folder


@pytest.fixture(scope="module")
def python(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with all that is installed here, and the new strategy as `pip install -e`."""
    made = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    (packages,) = made.glob("lib/python*/site-packages")
    beside = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in beside]
    (packages / "beside.pth").write_text("\n".join([*lines, str(ROOT)]) + "\n")
    found = made / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", found]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "install", "--quiet", *offline, "-e", project], check=True)
    return found


def run(python: Path, project: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [python, "-m", *words],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# --- what it writes


def test_it_writes_a_distribution_and_says_what_is_next(tmp_path: Path):
    status, said = new("last-light", "--into", str(tmp_path / "here"))
    assert status == 0
    assert {path.name for path in (tmp_path / "here").iterdir()} == FILES
    assert "moorage plugins check last_light.py" in said
    assert "pip install -e '.[test]'" in said


def test_nothing_is_left_of_the_templates_names(project: Path):
    for path in project.iterdir():
        if path.is_file():
            assert "my_strategy" not in path.name
            text = path.read_text()
            assert not any(word in text for word in ("my-strategy", "my_strategy", "MyStrategy"))


def test_without_a_folder_it_is_written_into_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plugins", "new", "last-light", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["strategy"] == document["folder"] == "last-light"
    assert set(document["files"]) == {path.name for path in (tmp_path / "last-light").iterdir()}


def test_it_is_written_in_this_projects_style(project: Path):
    for words in (["check"], ["format", "--check"]):
        settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--ignore", "S101"]
        settings = settings if words == ["check"] else settings[:3]
        done = run(Path(sys.executable), project, "ruff", *words, *settings, ".")
        assert done.returncode == 0, done.stdout


# --- that it works


def test_installed_it_is_listed_by_its_entry_point(python: Path, project: Path):
    done = run(python, project, "service.cli", "plugins", "list", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (found,) = (s for s in document["strategies"] if s["name"] == "last-light")
    assert found["source"] == "last-light: last_light"
    assert found["summary"].startswith("The whole model on the last GPU")
    assert document["broken"] == []


@pytest.mark.usefixtures("forked_simulations")
def test_it_passes_the_check_at_once(project: Path):
    file = str(project / "last_light.py")
    result = CliRunner().invoke(app, ["plugins", "check", file, "--json"])
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert {check["status"] for check in checks} == {"pass"}


def test_its_own_tests_pass_at_once(python: Path, project: Path):
    done = run(python, project, "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 passed" in done.stdout


def test_it_serves(project: Path, tmp_path: Path):
    folder = save_tiny(tmp_path / "m")
    file = tmp_path / "moorage.yaml"
    file.write_text(
        "version: 1\ndeployments:\n  here:\n"
        f"    model: {folder}\n    strategy: last-light\n    strategy_dirs: [{project}]\n"
        "    max_context: 64\n"
    )
    config = reading.load(file, {"MOORAGE_CACHE": str(tmp_path)}, Flags())
    with asked(config) as (tokens, document):
        assert tokens == plain_tokens(folder, 12)
    assert document["strategy"]["name"] == "last-light"


# --- what it refuses


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Last Light", "a letter first; did you mean 'last-light'?"),
        ("last_light", "did you mean 'last-light'?"),
        ("7-seas", "'7-seas' cannot name a strategy"),
        ("../cpu", "'../cpu' cannot name a strategy"),
        ("cpu", "there is a strategy cpu already: plugins/cpu.py; choose another"),
        ("json", "its module would be json.py, which is a module that is there already"),
        ("class", "its module would be class.py, which is a word of Python"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str, words: str):
    status, said = new(name, "--into", str(tmp_path / "here"))
    assert status == 2
    assert words in said
    assert not (tmp_path / "here").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    status, said = new("last-light", "--into", str(tmp_path))
    assert status == 2
    assert "is not empty; name a new folder with --into FOLDER" in said
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert new("last-light", "--into", str(tmp_path / "empty"))[0] == 0
    (tmp_path / "file").write_text("")
    status, said = new("last-light", "--into", str(tmp_path / "file"))
    assert status == 2
    assert "is a file" in said
