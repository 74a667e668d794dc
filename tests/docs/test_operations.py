"""docs/operations.md: the probes ask what exists, and mean what they say."""

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.deployment.reload import LIVE
from service.deployment.reload import WITHOUT_LOAD
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def probes() -> dict[str, Any]:
    [block] = re.findall(r"```yaml\n(startupProbe.*?)```", PAGE, re.DOTALL)
    found: dict[str, Any] = YAML(typ="safe").load(block)
    return found


def test_the_probes_ask_paths_that_exist():
    rules = {rule.rule for rule in create_app(FakeDeployment()).url_map.iter_rules()}
    assert probes().keys() == {"startupProbe", "readinessProbe", "livenessProbe"}
    for probe in probes().values():
        assert probe["httpGet"]["path"] in rules


def test_the_startup_probe_waits_as_long_as_a_load_may_take():
    probe = probes()["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= DeploymentConfig().load_timeout_s


def test_liveness_does_not_ask_for_readiness():
    loading = create_app(FakeDeployment(state="loading")).test_client()
    assert loading.get(probes()["livenessProbe"]["httpGet"]["path"]).status_code == 200
    assert loading.get(probes()["readinessProbe"]["httpGet"]["path"]).status_code == 503


def test_the_settings_that_need_no_load_are_named():
    [row] = re.findall(r"^\| only (.*?) \|", PAGE, re.MULTILINE)
    named = set(re.findall(r"`([\w.]+)`", row))
    assert named == {*WITHOUT_LOAD, *(f"server.{key}" for key in LIVE)}
    assert set(LIVE) <= ServerConfig.model_fields.keys()
    assert set(WITHOUT_LOAD) <= DeploymentConfig.model_fields.keys()
