"""The files of deploy/ agree with what the server does, and are what their tools read."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML
from typer.main import get_command

from service import __version__
from service import errors
from service.cli.main import app
from service.config import reading
from service.config import variables
from service.config.schema import ServerConfig
from service.web.app import create_app
from tests.docs.blocks import ROOT
from tests.docs.test_operations import probes
from tests.support.fake_deployment import FakeServing
from tests.web.asking import COMPLETIONS
from tests.web.asking import completion_body
from tests.web.test_metrics import Counting
from tests.web.test_metrics import Documented

DEPLOY = ROOT / "deploy"
KUBERNETES = "1.31"
SERVER = ServerConfig()


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def documents(name: str) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all(read(name)))


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def startup_errors() -> list[type[errors.StartupError]]:
    found, waiting = [], [errors.StartupError]
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    return found


def is_known(name: str) -> bool:
    """Whether Moorage reads this variable, or it is not one of its own."""
    own = {*variables.OWN, *variables.keys_by_name()}
    return not name.startswith(variables.PREFIX) or name in own


# --- systemd


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    """The [Service] section; a key may be there several times."""
    found: dict[str, list[str]] = {}
    section = read("moorage.service").partition("[Service]")[2].partition("[Install]")[0]
    for line in section.splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_unit_gives_running_answers_their_time(unit: dict[str, list[str]]):
    assert float(unit["TimeoutStopSec"][0]) > SERVER.grace_s


def test_the_unit_restarts_nothing_that_a_restart_does_not_mend(unit: dict[str, list[str]]):
    prevented = {int(status) for status in unit["RestartPreventExitStatus"][0].split()}
    assert prevented == {kind.exit_status for kind in startup_errors()} - {1} | {2}


def test_the_unit_sets_variables_that_exist(unit: dict[str, list[str]]):
    commented = re.findall(r"^#Environment=(.*)", read("moorage.service"), re.MULTILINE)
    names = [value.partition("=")[0] for value in [*unit["Environment"], *commented]]
    assert [name for name in names if not is_known(name)] == []


def test_the_commands_of_the_unit_are_commands(unit: dict[str, list[str]]):
    for key in ("ExecStart", "ExecReload"):
        program, command = unit[key][0].split()
        assert program == "/opt/moorage/bin/moorage"
        assert command in get_command(app).commands


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_reads_the_unit_and_finds_it_tight(tmp_path: Path):
    text = read("moorage.service").replace("/opt/moorage/bin/moorage", sys.executable)
    (tmp_path / "moorage.service").write_text(text)
    verified = _run("systemd-analyze", "verify", "--man=no", str(tmp_path / "moorage.service"))
    assert "moorage.service" not in verified.stderr
    looked = ("security", "--offline=true", "--threshold=25", str(tmp_path / "moorage.service"))
    security = _run("systemd-analyze", *looked)
    assert security.returncode == 0, security.stdout


# --- Docker


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """(instruction, the rest of it)"""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", read("Dockerfile"), flags=re.MULTILINE))
    return [(w, rest) for w, _, rest in (line.partition(" ") for line in text.splitlines()) if w]


def values(dockerfile: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for word, rest in dockerfile if word == instruction]


def test_every_source_that_the_image_copies_is_there(dockerfile: list[tuple[str, str]]):
    for copied in values(dockerfile, "COPY"):
        if not copied.startswith("--from"):
            for source in copied.split()[:-1]:
                assert (ROOT / source).exists(), source
    assert "COPY --from=build /opt/moorage /opt/moorage\n" in read("Dockerfile")


def test_what_the_image_copies_is_a_whole_distribution(
    dockerfile: list[tuple[str, str]], tmp_path: Path
):
    """Its `pip install` without the dependencies, which a test cannot fetch."""
    for copied in values(dockerfile, "COPY"):
        *sources, target = copied.split()
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, tmp_path / target, ignore=ignored)
            elif not source.startswith(("--from", "/")):
                shutil.copy(ROOT / source, tmp_path / target)
    installs = [run for run in values(dockerfile, "RUN") if "pip install" in run]
    assert installs == ["/opt/moorage/bin/pip install --no-cache-dir -c constraints.txt ."]
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    done = _run(*pip, *offline, "--wheel-dir", str(tmp_path / "made"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "made").glob("moorage-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"service/cli/main.py", "plugins/cpu.py", "service/web/static/docs.html"} <= names
    assert f"moorage-{__version__}.dist-info/entry_points.txt" in names


def test_the_image_runs_the_server_as_nobody_special(dockerfile: list[tuple[str, str]]):
    [user] = values(dockerfile, "USER")
    assert int(user) > 0
    assert f"--uid {user} " in " ".join(values(dockerfile, "RUN"))
    entry = json.loads(values(dockerfile, "ENTRYPOINT")[0])
    [command] = json.loads(values(dockerfile, "CMD")[0])
    assert entry == ["moorage"]
    assert command in get_command(app).commands
    names = [pair.partition("=")[0] for pair in shlex.split(values(dockerfile, "ENV")[0])]
    assert [name for name in names if not is_known(name)] == []


def test_compose_mounts_what_is_there_and_writes_where_it_may(tmp_path: Path):
    [compose] = documents("compose.yaml")
    service = compose["services"]["moorage"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert seconds(service["stop_grace_period"]) > SERVER.grace_s
    assert [name for name in service["environment"] if not is_known(name)] == []
    assert service["read_only"] is True
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert mounted == {"/etc/moorage/moorage.yaml", "/var/cache/moorage"}
    assert "VOLUME /var/cache/moorage\n" in read("Dockerfile")
    config = reading.load(DEPLOY / "moorage.yaml", {}, reading.Flags())
    assert config.name == "small"


# --- Kubernetes


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return {document["kind"]: document for document in documents("kubernetes.yaml")}


def test_the_manifest_is_what_kubernetes_reads(manifest: dict[str, Any]):
    assert manifest.keys() == {"ConfigMap", "PersistentVolumeClaim", "Service", "Deployment"}
    for document in manifest.values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_probes_of_the_manifest_are_those_of_the_page(manifest: dict[str, Any]):
    [container] = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    [port] = container["ports"]
    for name, probe in probes().items():
        probe["httpGet"]["port"] = port["name"]
        assert container[name] == probe
    assert port["containerPort"] == int(SERVER.bind.rpartition(":")[2])
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_the_pod_has_time_for_its_last_answers(manifest: dict[str, Any]):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    [sleep] = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1:]
    assert pod["terminationGracePeriodSeconds"] > SERVER.grace_s + float(sleep)


def test_the_pod_may_do_nothing_it_need_not(manifest: dict[str, Any]):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == int(
        re.findall(r"^USER (\d+)", read("Dockerfile"), re.MULTILINE)[0]
    )
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["image"] == f"moorage:{__version__}"
        assert container["args"][0] in get_command(app).commands
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["volumes"]}


def test_variables_that_kubernetes_makes_of_a_service_are_kept_away(manifest: dict[str, Any]):
    """A Service called moorage gives every container of its namespace MOORAGE_PORT and more."""
    name = manifest["Service"]["metadata"]["name"]
    made = {f"{name.upper()}_PORT": "tcp://10.0.0.1:80"}
    assert reading.load(None, made, reading.Flags()).notices
    assert manifest["Deployment"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_config_of_the_manifest_loads(manifest: dict[str, Any], tmp_path: Path):
    (tmp_path / "keys").write_text("k: sk-something-long-enough\n")
    text = manifest["ConfigMap"]["data"]["moorage.yaml"]
    (tmp_path / "moorage.yaml").write_text(text.replace("/etc/moorage-keys", str(tmp_path)))
    assert reading.load(tmp_path / "moorage.yaml", {}, reading.Flags()).name == "small"


# --- Prometheus and Grafana


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """Every sample of a busy server's /metrics -> its labels."""
    client = create_app(Documented(model=FakeServing(engine=Counting()))).test_client()
    client.post(COMPLETIONS, json=completion_body(max_tokens=4)).close()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> list[str]:
    [rules] = documents("prometheus-alerts.yaml")
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    panels = json.loads(read("grafana-dashboard.json"))["panels"]
    return [*alerts, *(target["expr"] for panel in panels for target in panel.get("targets", ()))]


@pytest.mark.parametrize("expression", expressions())
def test_every_query_is_one_over_metrics_that_exist(expression: str, samples: dict[str, set[str]]):
    filled = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
    promql_parser.parse(filled)
    names = re.findall(r"moorage:\w+", filled)
    assert names
    assert [name for name in names if name not in samples] == []
    labels = {"instance"}.union(*(samples[name] for name in names))
    for listed in re.findall(r"(?:by|on) \(([\w, ]+)\)", filled):
        assert set(listed.split(", ")) <= labels


def test_the_dashboard_shows_every_metric_or_one_like_it(samples: dict[str, set[str]]):
    """What is not shown is a part of what is."""
    shown = set(re.findall(r"moorage:\w+", read("grafana-dashboard.json")))
    hidden = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in samples}
    hidden -= {re.sub(r"_(bucket)$", "", name) for name in shown}
    assert hidden == {
        "moorage:watch_checks_total",
        "moorage:kv_tokens_planned",
        "moorage:kv_tokens_used",
        "moorage:request_time_per_output_token_seconds",
        "moorage:request_prefill_time_seconds",
        "moorage:request_decode_time_seconds",
        "moorage:request_inference_time_seconds",
        "moorage:request_success",
    }


def test_the_panels_of_the_dashboard_lie_side_by_side():
    panels = json.loads(read("grafana-dashboard.json"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & covered, panel["title"]
        assert at["x"] + at["w"] <= 24
        covered |= cells


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
