"""The variables of the script that came before: DEVICE_MAP and QUANTIZE."""

from pathlib import Path

import pytest
import torch

from tests.support.server import GUNICORN
from tests.support.server import MOORAGE
from tests.support.server import running

COMMANDS = [pytest.param(MOORAGE, id="moorage serve"), pytest.param(GUNICORN, id="gunicorn")]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an accelerator")


def test_4bit_on_the_cpu_serves_with_a_certificate_that_counts_its_linears(tmp_path: Path):
    with running(tmp_path, DEVICE_MAP="cpu", QUANTIZE="4bit") as server:
        server.wait_ready()
        document = server.placement()
        assert document["certificate"]["valid"]
        assert document["certificate"]["quantized_linears"] == 30 * 7
        checks = {check["class"]: check for check in document["certificate"]["checks"]}
        assert checks["F13"]["checked"] == 210
        assert document["origin"] == {"strategy": "env DEVICE_MAP", "quantize": "env QUANTIZE"}
        assert "Paris" in server.chat("What is the capital of France?")
        assert "MOORAGE_STRATEGY" in server.text
        assert "MOORAGE_QUANTIZE" in server.text


@NO_GPU
@pytest.mark.parametrize("command", COMMANDS)
def test_single_without_an_accelerator_exits_4_with_one_line(
    tmp_path: Path, command: tuple[str, ...]
):
    with running(tmp_path, command=command, DEVICE_MAP="single") as server:
        assert server.wait_exit() == 4
    errors = [line for line in server.text.splitlines() if "[ERROR]" in line]
    assert len(errors) == 1
    assert "there is no accelerator" in errors[0]
    assert "use strategy: cpu" in errors[0]
    assert "Traceback" not in server.text


def test_auto_works_without_an_accelerator_too(tmp_path: Path):
    with running(tmp_path, DEVICE_MAP="auto") as server:
        server.wait_ready()
        assert server.placement()["strategy"]["name"] == "auto-shard"
        assert "Paris" in server.chat("What is the capital of France?")


def test_an_unknown_value_lists_the_valid_ones_and_exits_3(tmp_path: Path):
    with running(tmp_path, DEVICE_MAP="gpus") as server:
        assert server.wait_exit() == 3
    assert "env DEVICE_MAP" in server.text
    assert "single" in server.text
