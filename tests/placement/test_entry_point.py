"""A strategy that somebody else packaged: built as a wheel, found by its entry point, served."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from service.config.schema import DeploymentConfig
from service.errors import PluginError
from service.placement import registry
from service.placement.certificate import certify
from tests.support.planned import GIB
from tests.support.planned import STRATEGY
from tests.support.planned import bring_up
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.tiny import save_tiny

SETUP_CFG = """\
[metadata]
name = harbour-strategies
version = 1.2

[options]
py_modules =
    harbour

[options.entry_points]
moorage.strategies =
    pilot = harbour
    wreck = harbour:missing
"""

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pip install` leaves it: the module and its metadata."""
    source = tmp_path_factory.mktemp("source")
    (source / "setup.cfg").write_text(SETUP_CFG)
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "harbour.py").write_text(STRATEGY)
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "--wheel-dir", wheels, source], check=True)
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "harbour", raising=False)


@pytest.mark.usefixtures("installed")
def test_an_installed_strategy_plans_loads_and_is_proven(tmp_path: Path):
    config = DeploymentConfig(strategy="pilot")
    strategy = registry.build(config.strategy_dirs).select(config.strategy)
    assert strategy.source == "harbour-strategies: harbour"
    assert strategy.summary == "A strategy for tests."
    folder = save_tiny(tmp_path / "m")
    loaded = bring_up(strategy, model_config(folder, strategy="pilot"), ram(GIB))
    assert certify(loaded).valid


@pytest.mark.usefixtures("installed")
def test_an_entry_point_to_nothing_is_its_packages_fault_alone():
    found = registry.build()
    assert "pilot" in found.strategies
    with pytest.raises(PluginError, match="strategy wreck failed to import") as caught:
        found.select("wreck")
    assert "has no attribute 'missing'" in caught.value.message
    assert caught.value.hint == "see harbour-strategies: harbour:missing"


def test_it_is_gone_when_it_is_not_installed():
    found = registry.build()
    assert "pilot" not in found.strategies
    assert "wreck" not in found.broken
