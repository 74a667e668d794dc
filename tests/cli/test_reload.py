"""`moorage reload` finds the server, hands on what is wished, and says what the server says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from service.config.control_socket import Listener
from service.config.control_socket import default_path
from tests.cli.conftest import Run

DONE = {
    "way": "drained",
    "deployment": "here",
    "model": "two",
    "changed": ["model"],
    "seconds": 2.5,
    "warnings": ["the old model is not given back"],
}


def server(path: Path, *messages: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Listens there and says this; what it was asked is in the list."""
    asked: list[Mapping[str, Any]] = []

    def obey(request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        asked.append(request)
        return list(messages)

    Listener(path, obey)
    return asked


def test_it_finds_the_server_by_its_config(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    text = "version: 1\nserver: {bind: '127.0.0.1:8123'}\ndeployments: {here: {}, there: {}}\n"
    (tmp_path / "moorage.yaml").write_text(text)
    path = default_path("127.0.0.1:8123", {"XDG_RUNTIME_DIR": str(tmp_path)})
    asked = server(path, {"progress": {"doing": "planning here"}}, {"result": DONE})
    done = run("reload", "--deployment", "there", "--no-drain", "--force")
    assert done.exit_code == 0, done.output
    assert "planning here" in done.stderr
    assert "two of deployment here serves, 2.5 s" in done.stdout
    assert "warning: the old model is not given back" in done.stderr
    assert asked == [
        {
            "command": "reload",
            "deployment": "there",
            "drain": False,
            "force": True,
            "wait": True,
        }
    ]


def test_the_servers_error_is_its_error(run: Run, tmp_path: Path) -> None:
    error = {"message": "1 GiB short", "type": "server_error", "code": "does_not_fit", "hint": "x"}
    server(tmp_path / "run/s", {"error": error, "exit_status": 4})
    done = run("reload", "--socket", tmp_path / "run/s")
    assert done.exit_code == 4
    assert done.stderr == "moorage: 1 GiB short  fix: x\n"


def test_any_free_port_says_where_to_look(run: Run) -> None:
    done = run("reload", "--bind", "127.0.0.1:0")
    assert done.exit_code == 1
    assert "any free port" in done.stderr
    assert "--socket" in done.stderr


def test_a_mistake_in_the_config_is_told_before_anybody_is_asked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "moorage.yaml").write_text("version: 1\ndeployments: {here: {modle: x}}\n")
    done = run("reload")
    assert done.exit_code == 3
    assert "unknown key" in done.stderr
