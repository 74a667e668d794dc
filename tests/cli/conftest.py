"""The command line in this process, in a folder of its own, with a clean environment."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from service.cli.main import app
from tests.support.tiny import save_tiny

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model folder. Not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in `tmp_path`; the cache is below it."""
    for name in [n for n in os.environ if n.startswith("MOORAGE_")]:
        monkeypatch.delenv(name)
    for name in ("DEVICE_MAP", "QUANTIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOORAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return invoke


def as_json(result: Result) -> Any:
    return json.loads(result.stdout)
