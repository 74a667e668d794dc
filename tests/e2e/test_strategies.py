"""Strategies that fail, under the real server: never ready, and the reason by name."""

import json
from pathlib import Path

import pytest

from tests.support.server import GUNICORN
from tests.support.server import running
from tests.support.tiny import save_tiny

HOOKS = '''
"""Fails on purpose."""
import time
from transformers import AutoModelForCausalLM
from service.placement import inputs
from service.placement.hookspecs import hookimpl

@hookimpl
def load(config, placement):
    {before}
    model = AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)
    {after}
    return model

@hookimpl
def validate(model, placement):
    pass

@hookimpl
def place_inputs(model, inputs):
    return dict(inputs)
'''
META = "model.lm_head.to('meta')"
FAULTS = {
    "lm_head on meta": ("pass", META, 8, "lm_head.weight was left on meta (F1)"),
    "raises": ("raise ValueError('no luck')", "pass", 1, "load raised ValueError: no luck"),
    "hangs": ("time.sleep(3600)", "pass", 1, "was not done within load_timeout_s: 6 s"),
    "None": ("return None", "pass", 7, "load returned None; it must return the model"),
    "moves a buffer": (
        "pass",
        "model.model.rotary_emb.to('meta')",
        8,
        "model.rotary_emb.inv_freq",
    ),
}


@pytest.mark.parametrize(
    ("before", "after", "status", "message"), FAULTS.values(), ids=FAULTS.keys()
)
def test_a_failing_strategy_never_becomes_ready_and_says_why(
    tmp_path: Path, before: str, after: str, status: int, message: str
):
    save_tiny(tmp_path / "model", "llama")
    folder = tmp_path / "strategies"
    folder.mkdir()
    (folder / "broken_one.py").write_text(HOOKS.format(before=before, after=after))
    (tmp_path / "moorage.yaml").write_text(
        "version: 1\ndeployments:\n  x:\n    model: ./model\n    strategy: broken-one\n"
        "    strategy_dirs: [./strategies]\n"
        # a machine that is busy may take that long to import torch
        + ("    load_timeout_s: 6\n" if "load_timeout_s" in message else "")
    )
    with running(tmp_path, command=GUNICORN) as server:
        assert server.wait_exit() == status
    errors = [line for line in server.text.splitlines() if "[ERROR]" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert "ready" not in server.text
    assert "Traceback" not in server.text


def test_a_fallback_serves_where_the_first_strategy_cannot(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama")
    folder = tmp_path / "strategies"
    folder.mkdir()
    (folder / "broken_one.py").write_text(HOOKS.format(before="pass", after=META))
    (tmp_path / "moorage.yaml").write_text(
        "version: 1\ndeployments:\n  x:\n    model: ./model\n    strategy: broken-one\n"
        "    strategy_dirs: [./strategies]\n    fallback: [cpu]\n"
    )
    with running(tmp_path, command=GUNICORN) as server:
        server.wait_ready()
        document = server.placement()
    assert document["strategy"]["name"] == "cpu"
    (attempt,) = document["attempts"]
    assert attempt["strategy"] == "broken-one"
    assert attempt["error"]["failure_class"] == "F1"
    assert "lm_head.weight" in json.dumps(attempt)
