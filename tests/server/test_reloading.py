"""`moorage reload`, unloading and waking on the real server, and faults in the middle of them."""

import contextlib
import http.client
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server.process import LIMIT_S
from tests.server.process import ROOT
from tests.server.process import Server
from tests.server.process import wait_for
from tests.server.test_real_app import CONF
from tests.server.test_real_app import ready
from tests.support.tiny import save_tiny

# holds its thread in `load` as long as there is a file "hold" beside it; "held" says that it does
HOLDING = """
import time
from pathlib import Path

from service.placement import checks, planning
from service.placement.hookspecs import hookimpl
from service.placement.inputs import to_input_device

HOLD = Path(__file__).parent / "hold"


@hookimpl
def plan(config, hardware):
    return planning.on_one_device(config, hardware, "cpu")


@hookimpl
def load(config, placement):
    from transformers import AutoModelForCausalLM

    while HOLD.exists():
        HOLD.with_name("held").touch()
        time.sleep(0.01)
    return AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)


@hookimpl
def validate(model, placement):
    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    return to_input_device(model, inputs)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models that answer differently."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "one")
    save_tiny(folder / "two", dtype=torch.bfloat16)
    return folder


class Place:
    """A server's folder: its config, its control socket, its strategy that can be held."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder, self.models = folder, models
        self.socket = folder / "run" / "s"
        (folder / "strategies").mkdir()
        (folder / "strategies/holding.py").write_text(HOLDING)
        self.hold = folder / "strategies/hold"
        self.write()

    def write(self, model: str = "one", server: dict[str, Any] | None = None, **keys: Any) -> None:
        deployment = {
            "model": str(self.models / model),
            "strategy": "cpu",
            "strategy_dirs": ["./strategies"],
            "max_context": 512,
        }
        document = {
            "version": 1,
            "server": {
                "bind": "127.0.0.1:0",
                "threads": 16,
                "grace_s": 5,
                "control_socket": "run/s",
                **(server or {}),
            },
            "deployments": {"here": deployment | keys},
        }
        (self.folder / "moorage.yaml").write_text(json.dumps(document, indent=1))

    def serve(self) -> Server:
        return Server(self.folder / "log", conf=CONF, cwd=self.folder)

    def reload(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-m", "service.cli", "reload", "--socket", str(self.socket))
        return subprocess.run(
            (*command, *arguments),
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Iterator[Place]:
    made = Place(tmp_path, models)
    yield made
    made.hold.unlink(missing_ok=True)


def served(server: Server) -> str:
    name: str = server.get("/v1/models").json["data"][0]["id"]
    return name


def begin(server: Server, model: str, max_tokens: int) -> http.client.HTTPConnection:
    """Ask, and do not wait for the answer."""
    body = {
        "model": model,
        "prompt": "hello",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def end(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    """The status and the answer."""
    with contextlib.closing(connection), connection.getresponse() as response:
        return response.status, json.loads(response.read())


def text(server: Server, model: str, max_tokens: int = 8) -> str:
    return text_of(end(begin(server, model, max_tokens)))


def text_of(ended: tuple[int, Any]) -> str:
    status, answer = ended
    assert status == 200, answer
    found: str = answer["choices"][0]["text"]
    return found


def held(place: Place) -> None:
    wait_for("the load", lambda: (place.folder / "strategies/held").exists())


def test_a_reload_under_load_drops_nothing_and_mixes_nothing(place: Place) -> None:
    with place.serve() as server:
        ready(server)
        control = place.socket.lstat()
        assert stat.S_IMODE(control.st_mode) == 0o600
        assert stat.S_IMODE(place.socket.parent.lstat().st_mode) == 0o700
        one = text(server, "one", 100)
        stop = threading.Event()
        got: list[tuple[str, int, Any]] = []

        def work() -> None:
            while not stop.is_set():
                model = served(server)
                got.append((model, *end(begin(server, model, 100))))

        working = threading.Thread(target=work)
        working.start()
        place.write("two")
        done = place.reload("--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["way"], result["model"], result["warnings"]) == ("beside", "two", [])
        wait_for("an answer of the new one", lambda: got and got[-1][0] == "two")
        stop.set()
        working.join(60)
        two = text(server, "two", 100)
        assert one != two
        for model, status, answer in got:
            if status == 404:  # it asked for the old name a moment after the change
                assert model == "one"
                continue
            assert status == 200, answer
            assert answer["choices"][0]["text"] == (one if answer["model"] == "one" else two)
        assert "Traceback" not in server.log()
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        assert not place.socket.exists()


PROMPTS = ("hello", "The sea is calm", "a" * 40, "once upon a time there was")


def streamed(server: Server, model: str, prompt: str) -> tuple[int, str, str]:
    """The status, the model that says it answers, and the text of a stream that has its end."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 200,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)
    headers = {"Content-Type": "application/json"}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            return response.status, model, response.read().decode()
        lines = [line.removeprefix(b"data: ").strip() for line in response if line[:5] == b"data:"]
    assert lines[-1] == b"[DONE]", lines[-1]
    chunks = [json.loads(line) for line in lines[:-1]]
    (named,) = {chunk["model"] for chunk in chunks}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length", chunks[-1]
    return 200, named, "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_streams_beside_each_other_are_all_of_one_model_through_a_reload(
    place: Place, models: Path
) -> None:
    """In float32: there a text is the same alone and in a batch of any size."""
    save_tiny(models / "three", seed=3)
    with place.serve() as server:
        ready(server)
        expected = {"one": [streamed(server, "one", prompt)[2] for prompt in PROMPTS]}
        stop = threading.Event()
        got: list[tuple[int, str, int, str]] = []
        failures: list[BaseException] = []

        def work(which: int) -> None:
            try:
                while not stop.is_set():
                    asked = served(server)
                    status, model, said = streamed(server, asked, PROMPTS[which])
                    got.append((which, model, status, said))
            except BaseException as error:
                failures.append(error)
                raise

        def wait_answered(name: str) -> None:
            begun = len(got)

            def probe() -> bool:
                seen = {which for which, model, *_ in got[begun:] if model == name}
                return bool(failures) or len(seen) == len(PROMPTS)

            wait_for(f"streams of {name}", probe)

        working = [threading.Thread(target=work, args=(which,)) for which in range(len(PROMPTS))]
        for thread in working:
            thread.start()
        try:
            place.hold.touch()
            place.write("three", strategy="holding")
            assert place.reload("--no-wait").returncode == 0
            held(place)
            wait_answered("one")  # in the middle of the load
            place.hold.unlink()
            wait_answered("three")
        finally:
            stop.set()
            for thread in working:
                thread.join(60)
        assert failures == []
        expected["three"] = [streamed(server, "three", prompt)[2] for prompt in PROMPTS]
        for of_old, of_new in zip(expected["one"], expected["three"], strict=True):
            assert of_old != of_new
        for which, model, status, said in got:
            if status == 404:  # it asked for the old name a moment after the change
                assert model == "one"
                continue
            assert (status, said) == (200, expected[model][which])
        assert "Traceback" not in server.log()


def test_a_config_of_nonsense_is_refused_with_its_place_and_the_old_model_serves(
    place: Place,
) -> None:
    with place.serve() as server:
        ready(server)
        before = text(server, "one")
        (place.folder / "moorage.yaml").write_text("version: 1\ndeployments:\n  here: {modle: x}\n")
        done = place.reload()
        assert done.returncode == 3
        assert "moorage.yaml:3:10: deployments.here.modle: unknown key" in done.stderr
        place.write("nowhere")
        done = place.reload()
        assert done.returncode == 6
        assert "Now the old model serves on" in done.stderr
        place.write(server={"threads": 20})
        done = place.reload()
        assert done.returncode == 3
        assert "server.threads: has changed, which needs a restart" in done.stderr
        assert text(server, "one") == before


def test_the_second_of_two_reloads_is_refused_by_name(place: Place) -> None:
    with place.serve() as server:
        ready(server)
        place.hold.touch()
        place.write("two", strategy="holding")
        begun = place.reload("--no-wait", "--json")
        assert json.loads(begun.stdout) == {"way": "begun"}
        held(place)
        second = place.reload("--json")
        assert second.returncode == 1
        assert "a reload is running since" in json.loads(second.stdout)["error"]["message"]
        assert text(server, "one")
        place.hold.unlink()
        wait_for("the new model", lambda: served(server) == "two")


def test_sigterm_during_a_reload_ends_the_server_as_ever(place: Place) -> None:
    with place.serve() as server:
        ready(server)
        place.hold.touch()
        place.write("two", strategy="holding")
        ended: list[subprocess.CompletedProcess[str]] = []
        waiting = threading.Thread(target=lambda: ended.append(place.reload()))
        waiting.start()
        held(place)
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        waiting.join(60)
        assert ended[0].returncode == 1
        assert "the server ended before it had answered" in ended[0].stderr


def workers(server: Server) -> list[int]:
    """The ids of all workers so far that listened for commands."""
    return [int(pid) for pid in re.findall(r"\[(\d+)\] \[INFO\] Control socket", server.log())]


def test_a_worker_killed_during_a_reload_is_followed_by_one_with_the_old_model(
    place: Place,
) -> None:
    with place.serve() as server:
        ready(server)
        place.hold.touch()
        place.write("two", strategy="holding")
        assert place.reload("--no-wait").returncode == 0
        held(place)
        [killed] = workers(server)
        os.kill(killed, signal.SIGKILL)
        wait_for("a fresh worker", lambda: len(workers(server)) == 2)
        ready(server)
        assert served(server) == "one"


def test_a_worker_killed_after_a_reload_is_followed_by_one_with_the_new_model(
    place: Place,
) -> None:
    with place.serve() as server:
        ready(server)
        place.write("two")
        assert place.reload().returncode == 0
        (place.folder / "moorage.yaml").write_text("nonsense")
        [killed] = workers(server)
        os.kill(killed, signal.SIGKILL)
        wait_for("a fresh worker", lambda: len(workers(server)) == 2)
        ready(server)
        assert served(server) == "two"
        assert place.reload().returncode == 3


def test_an_idle_model_is_unloaded_and_woken_by_requests_that_share_one_load(
    place: Place,
) -> None:
    place.write("one", idle_unload_s=1, strategy="holding")

    def loads() -> int:
        return server.log().count("is loaded again after")

    with place.serve() as server:
        ready(server)
        before = text(server, "one")  # may have woken it already, on a slow machine
        place.hold.touch()
        wait_for("idle", lambda: server.get("/placement").json["state"] == "idle")
        loaded = loads()
        health = server.get("/health/ready")
        assert (health.status, health.json["state"]) == (200, "idle")
        assert served(server) == "one"
        asking = [begin(server, "one", 8) for _ in range(4)]
        held(place)
        place.hold.unlink()
        assert [text_of(end(one)) for one in asking] == [before] * 4
        assert loads() == loaded + 1
        assert "Traceback" not in server.log()
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0


def test_without_a_server_it_says_so(place: Place) -> None:
    done = place.reload()
    assert done.returncode == 1
    assert f"no server listens on {place.socket}" in done.stderr
