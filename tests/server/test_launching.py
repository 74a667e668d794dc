"""`gunicorn -c gunicorn.conf.py` and `moorage serve` are the same server."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from gunicorn.app.wsgiapp import WSGIApplication

from service.cli.serve import application
from service.config.flags import Flags
from service.config.gunicorn_options import settings
from service.config.reading import load_process
from tests.server.process import ROOT
from tests.server.process import Server

CONF = str(ROOT / "gunicorn.conf.py")
FAKE_APP = "tests.server.fake_app:create_app"
SERVE = (
    sys.executable,
    "-c",
    "import typer\n"
    "from service.cli.serve import serve\n"
    "from service.config import gunicorn_options\n"
    f"gunicorn_options.APP = {FAKE_APP!r}\n"
    "typer.run(serve)",
)


def shown(cfg: Any) -> dict[str, str]:
    """gunicorn's effective settings, as --print-config prints them."""
    return {
        name: getattr(setting.get(), "__qualname__", None) or repr(setting.get())
        for name, setting in cfg.settings.items()
        if name not in ("config", "default_proc_name")
    }


@pytest.fixture
def yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A moorage.yaml in the working directory."""
    path = tmp_path / "moorage.yaml"
    path.write_text(
        "version: 1\n"
        "server: {bind: '127.0.0.1:0', threads: 20, grace_s: 7}\n"
        "deployments: {here: {model: smollm2-135m}}\n"
    )
    monkeypatch.chdir(tmp_path)
    return path


def test_both_ways_to_launch_have_the_same_settings(
    yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gunicorn", "-c", CONF])
    monkeypatch.setattr(sys, "path", list(sys.path))  # gunicorn puts the working directory there
    # The default was taken when gunicorn was imported.
    monkeypatch.setattr("gunicorn.config.Chdir.default", str(yaml.parent))
    by_gunicorn = shown(WSGIApplication().cfg)
    by_command = shown(application(settings(load_process(Flags()))).cfg)
    assert by_gunicorn == by_command
    assert by_command["threads"] == "20"
    assert by_command["graceful_timeout"] == "7"
    assert by_command["worker_class"] == "Worker"
    assert by_command["post_worker_init"] == "Hooks.post_worker_init"


def test_the_gunicorn_master_never_imports_torch(tmp_path: Path) -> None:
    with Server(
        tmp_path / "log", FAKE_APP, conf=CONF, MOORAGE_BIND="127.0.0.1:0", cwd=tmp_path
    ) as server:
        server.ready()
        loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "pydantic_core" in loaded
    assert "torch" not in loaded


def test_serve_applies_its_flags_and_says_in_json_that_it_is_ready(
    yaml: Path, tmp_path: Path
) -> None:
    command = (*SERVE, "--set", "server.threads=12", "--json")
    with Server(tmp_path / "log", command=command, cwd=tmp_path) as server:
        assert server.ready().get("/process").json["config"] == {"threads": 12, "name": "here"}
        line = next(line for line in server.log().splitlines() if line.startswith('{"ready"'))
        ready = json.loads(line)["ready"]
        assert ready["model"] == "fake-model"
        assert ready["address"] == f"http://127.0.0.1:{server.port}"
        assert ready["pid"] == server.process.pid


def test_serve_exits_with_the_status_of_a_failed_load(yaml: Path, tmp_path: Path) -> None:
    command = (*SERVE, "--json")
    with Server(tmp_path / "log", command=command, cwd=tmp_path, FAKE_LOAD="DoesNotFit") as server:
        assert server.exit_status() == 4
        assert len(re.findall("the fake does not load  fix: use a real one", server.log())) == 1
        assert '{"error": {"message": "the fake does' in server.log()
        assert "Traceback" not in server.log()


def test_serve_refuses_more_workers_too(yaml: Path, tmp_path: Path) -> None:
    with Server(
        tmp_path / "log", command=SERVE, cwd=tmp_path, GUNICORN_CMD_ARGS="--workers 2"
    ) as server:
        assert server.exit_status() == 3
        assert server.log().startswith("gunicorn: workers: is 2;")


@pytest.mark.parametrize("command", [None, SERVE], ids=["gunicorn", "serve"])
def test_a_wrong_config_is_shown_with_its_line_and_no_traceback(
    command: tuple[str, ...] | None, yaml: Path, tmp_path: Path
) -> None:
    yaml.write_text(yaml.read_text() + "serve: 1\n")
    with Server(tmp_path / "log", conf=CONF, command=command, cwd=tmp_path) as server:
        assert server.exit_status() == 3
        assert "moorage.yaml:4:1" in server.log()
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("command", [None, SERVE], ids=["gunicorn", "serve"])
def test_a_package_of_the_users_that_hides_plugins_is_named(
    command: tuple[str, ...] | None, tmp_path: Path
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "__init__.py").touch()
    with Server(tmp_path / "log", conf=CONF, command=command, cwd=tmp_path) as server:
        assert server.exit_status() == 7
        assert str(tmp_path / "plugins") in server.log()
        assert "Traceback" not in server.log()
