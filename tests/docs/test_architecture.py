"""docs/architecture.md: the two flows are what a server calls, in the order told."""

import sys
from collections.abc import Sequence

import pytest

from tests.docs.following import told
from tests.support.server import running
from tests.support.tiny import save_tiny


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What a server called until it was ready, and for one streamed chat: who and what."""
    folder = tmp_path_factory.mktemp("architecture")
    file = folder / "calls"
    command = (sys.executable, "-m", "tests.docs.following", str(file), "serve")
    model = str(save_tiny(folder / "tiny", "llama"))
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "ignore_eos": True,
        "stream": True,
    }
    with running(folder, "--model", model, "--strategy", "cpu", command=command) as server:
        server.wait_ready()
        before = len(file.read_text().splitlines())
        answer = server.post("/v1/chat/completions", body)
        assert answer.text.endswith("data: [DONE]\n\n")
        # a slot is released when the last byte has left
        server.process.terminate()
        assert server.wait_exit() == 0
    lines = file.read_text().splitlines()
    return {"Flow 1": lines[:before], "Flow 2": lines[before:]}


def firsts(lines: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The lines that are wanted, each where it comes first."""
    return [line for line in dict.fromkeys(lines) if line in wanted]


def test_a_config_becomes_a_served_model_as_it_is_told(calls: dict[str, list[str]]):
    steps = told("Flow 1")
    assert len(steps) > 15
    assert firsts(calls["Flow 1"], steps) == steps


@pytest.mark.parametrize("who", ["HTTP", "engine"])
def test_a_request_takes_the_way_that_is_told(who: str, calls: dict[str, list[str]]):
    steps = [step for step in told("Flow 2") if step.startswith(f"{who} ")]
    assert len(steps) > 5
    assert firsts(calls["Flow 2"], steps) == steps


def test_the_engine_begins_when_a_prompt_was_submitted(calls: dict[str, list[str]]):
    submitted = calls["Flow 2"].index("HTTP service.engine.engine.Engine.submit_all")
    assert not any(line.startswith("engine ") for line in calls["Flow 2"][:submitted])
