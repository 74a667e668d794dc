"""`moorage model`: the catalogue and fetching from it."""

from pathlib import Path

import pytest

from service.models import fetch
from tests.cli.conftest import Run
from tests.cli.conftest import as_json


def test_the_list_says_what_is_here(run: Run, tmp_path: Path) -> None:
    here = fetch.path_of("smollm2-135m", tmp_path / "cache")
    models = {m["name"]: m for m in as_json(run("model", "list", "--json"))["models"]}
    assert models["smollm2-135m"]["folder"] is None
    here.mkdir(parents=True)
    (here / "moorage.json").write_text("{}")
    models = {m["name"]: m for m in as_json(run("model", "list", "--json"))["models"]}
    assert models["smollm2-135m"]["folder"] == str(here)
    assert models["all-minilm-l6-v2"]["licence"] == "MIT"
    lines = run("model", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "smollm2-135m", "all-minilm-l6-v2"]


def test_fetch_prints_the_folder_and_says_what_it_does_on_stderr(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(name: str, cache: Path, report: fetch.Report) -> Path:
        report("downloading it", 0.0)
        report("downloading it", 0.1)
        report("ready", 1.0)
        return tmp_path

    monkeypatch.setattr(fetch, "fetch", fake)
    result = run("model", "fetch", "smollm2-135m")
    assert result.stdout == f"{tmp_path}\n"
    assert result.stderr == "  0%  downloading it\n100%  ready\n"
    assert as_json(run("model", "fetch", "smollm2-135m", "--json"))["folder"] == str(tmp_path)


def test_an_unknown_model_is_6_and_suggests(run: Run) -> None:
    result = run("model", "fetch", "smollm2", "--json")
    assert result.exit_code == 6
    assert "smollm2-135m" in result.stderr
    assert as_json(result)["error"]["code"] == "model_unavailable"
