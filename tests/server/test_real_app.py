"""The real app and a tiny random model under gunicorn: the parts fit together."""

import http.client
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import ROOT
from tests.server.process import Server
from tests.server.process import wait_for
from tests.support.tiny import save_tiny

CONF = str(ROOT / "gunicorn.conf.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def config(folder: Path, model: Path, **values: object) -> None:
    deployment = {"model": str(model), "strategy": "cpu", "max_context": 512} | values
    document = {
        "version": 1,
        "server": {"bind": "127.0.0.1:0", "threads": 16, "grace_s": 5},
        "deployments": {"here": deployment},
    }
    (folder / "moorage.yaml").write_text(json.dumps(document))  # JSON is YAML


def chat(server: Server, max_tokens: int) -> Iterator[dict[str, Any]]:
    """The events of one streamed answer, up to [DONE] or the end."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    with connection.getresponse() as response:
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))
    connection.close()


def ready(server: Server) -> Server:
    wait_for("readiness", lambda: server.port and server.try_get("/health/ready") == 200)
    return server


@pytest.mark.parametrize(
    "command", [None, (sys.executable, "-m", "service.cli", "serve")], ids=["gunicorn", "serve"]
)
def test_it_loads_answers_and_stops(
    command: tuple[str, ...] | None, model: Path, tmp_path: Path
) -> None:
    config(tmp_path, model)
    with Server(tmp_path / "log", conf=CONF, command=command, cwd=tmp_path) as server:
        events = list(chat(ready(server), 8))
        assert "choices" in events[-1]
        loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "torch" not in loaded
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        assert "Traceback" not in server.log()


def test_a_stream_that_sigterm_ends_says_so(model: Path, tmp_path: Path) -> None:
    config(tmp_path, model)
    where: dict[str, Any] = {"conf": str(ROOT / "tests/server/web_conf.py"), "cwd": tmp_path}
    ours = {"TEST_APP": "service.web.wsgi:build", "TEST_FLUSH_S": "60"}
    with Server(tmp_path / "log", **where, **ours) as server:
        events = chat(ready(server), 480)
        next(events)
        server.signal(signal.SIGTERM)
        server.logged("Stopping")
        server.signal(signal.SIGTERM)
        last = list(events)[-1]
        finished = "choices" in last and last["choices"][0]["finish_reason"] == "length"
        assert finished or last["error"]["code"] == "engine_stopped"
        assert server.exit_status() == 0


def test_a_strategy_that_cannot_work_here_ends_the_server_with_one_line(
    model: Path, tmp_path: Path
) -> None:
    config(tmp_path, model, strategy="single-gpu")
    with Server(tmp_path / "log", conf=CONF, cwd=tmp_path, CUDA_VISIBLE_DEVICES="") as server:
        assert server.exit_status() == 4
        assert server.log().count("[ERROR]") == 1
        assert "Traceback" not in server.log()


DRIFTING = """
import time
from pathlib import Path

from service.placement import planning
from service.placement.hookspecs import hookimpl
from service.placement.inputs import to_input_device

NOW = Path({trigger!r})


@hookimpl
def plan(config, hardware):
    return planning.on_one_device(config, hardware, "cpu")


@hookimpl
def load(config, placement):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)


@hookimpl
def validate(model, placement):
    pass


@hookimpl
def place_inputs(model, inputs):
    time.sleep(0.02)  # a stream takes its time: it is still there when the test acts
    if NOW.exists():
        NOW.unlink()
        model.half()
    return to_input_device(model, inputs)
"""


@pytest.mark.parametrize(("on_drift", "workers"), [("stop", 2), ("reload", 1)])
def test_a_model_that_changes_ends_its_streams_and_is_served_again(
    model: Path, tmp_path: Path, on_drift: str, workers: int
) -> None:
    trigger = tmp_path / "now"
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies/drifting.py").write_text(DRIFTING.format(trigger=str(trigger)))
    mine = {"strategy": "drifting", "strategy_dirs": ["./strategies"]}
    config(tmp_path, model, **mine, on_drift=on_drift, watch_interval_s=0.02)
    with Server(tmp_path / "log", conf=CONF, cwd=tmp_path) as server:
        events = chat(ready(server), 480)
        next(events)
        trigger.touch()
        last = list(events)[-1]
        assert last["error"]["code"] == "placement_drifted"
        assert "was float32, is float16" in last["error"]["message"]
        wait_for("the model again", lambda: server.log().count("Moorage is ready") == 2)
        ready(server)
        assert "choices" in list(chat(server, 4))[-1]
        pids = re.findall(r"\[(\d+)\] \[INFO\] Moorage is ready", server.log())
        assert len(set(pids)) == workers
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
