"""The strategies that we ship keep the contract, as pytest tells it and as the command does."""

import json
from pathlib import Path
from typing import Any
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.placement.hardware import GIB
from service.testing import StrategyContract
from service.testing import contract
from service.testing.machines import ram
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("forked_simulations")
DISK_LAYERS = Path(__file__).resolve().parents[2] / "examples" / "strategies" / "disk_layers.py"


class TestCpu(StrategyContract):
    strategy = "cpu"


class TestSingleGpu(StrategyContract):
    """Without a GPU only its plans are checked; the others are skipped and say so."""

    strategy = "single-gpu"


class TestAutoShard(StrategyContract):
    strategy = "auto-shard"


class TestAutoShardPartlyOnDisk(StrategyContract):
    strategy = "auto-shard"
    settings: ClassVar[dict[str, Any]] = {
        "on_no_fit": "offload-disk",
        "max_memory": {"cpu": 1_900_000},
    }
    hardware = ram(GIB)

    def test_part_of_it_is_on_disk(self, case: contract.Case) -> None:
        assert case.placement.devices == ("cpu", "disk")


class TestFourBit(StrategyContract):
    strategy = "four-bit"


class TestInt8(StrategyContract):
    strategy = "cpu"
    settings: ClassVar[dict[str, Any]] = {"quantize": "int8"}


class TestDiskLayers(StrategyContract):
    strategy = "../../examples/strategies/disk_layers.py"
    settings: ClassVar[dict[str, Any]] = {"options": {"layers": 3}}


class TestATiedModelOfYourOwn(StrategyContract):
    strategy = "cpu"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def tied(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("tied") / "m"
        cls.model = save_tiny(folder, "gemma2", tie=True, initializer_range=0.05)


@pytest.mark.parametrize("name", ["cpu", "auto-shard", "four-bit", str(DISK_LAYERS)])
def test_the_command_passes_it_too(name: str):
    result = CliRunner().invoke(app, ["plugins", "check", name, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"]
    assert [check["check"] for check in document["checks"]] == [name for name, _ in contract.CHECKS]
    assert {check["status"] for check in document["checks"]} == {"pass"}


def test_what_needs_a_gpu_is_not_run_without_one_and_says_so():
    """On a machine that has one, nothing is skipped."""
    result = CliRunner().invoke(app, ["plugins", "check", "single-gpu", "--json"])
    assert result.exit_code == 0
    checks = json.loads(result.stdout)["checks"]
    assert [check["status"] for check in checks[:4]] == ["pass"] * 4
    skipped = [check["message"] for check in checks if check["status"] == "skip"]
    assert all("needs cuda:0, but there is no accelerator" in message for message in skipped)


def test_every_check_is_a_test_of_the_class():
    tests = {name.removeprefix("test_") for name in vars(StrategyContract) if "test_" in name}
    assert tests == {name.replace("-", "_") for name, _ in contract.CHECKS}
