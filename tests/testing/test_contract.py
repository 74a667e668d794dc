"""The strategies that we ship keep the contract, as pytest tells it and as the command does."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.placement.hardware import GIB
from service.placement.overhead import CPU_KERNELS
from service.testing import StrategyContract
from service.testing import contract
from service.testing.machines import ram
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("forked_simulations")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "strategies"
DISK_LAYERS = EXAMPLES / "disk_layers.py"
EXPERTS_APART = EXAMPLES / "experts_apart.py"


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
        "max_memory": {"cpu": 1_900_000 + CPU_KERNELS},
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


class TestFirstLayersOnCpu(StrategyContract):
    """Without a GPU its plans are checked, and run on simulated cards."""

    strategy = "../../examples/strategies/first_layers_on_cpu.py"


class TestExpertsApart(StrategyContract):
    strategy = "../../examples/strategies/experts_apart.py"
    settings: ClassVar[dict[str, Any]] = {"options": {"experts": "disk"}}

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def mixture(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("mixture") / "m"
        cls.model = save_tiny(folder, "qwen3_moe", initializer_range=0.05)

    def test_the_experts_are_on_disk(self, case: contract.Case) -> None:
        assert case.placement.devices == ("cpu", "disk")


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
class TestInt8TorchAo(StrategyContract):
    strategy = "../../examples/strategies/int8_torchao.py"


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


def test_the_command_takes_a_mixture_of_experts():
    words = ["plugins", "check", str(EXPERTS_APART), "--model", "qwen3_moe", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    checks = {check["check"]: check for check in json.loads(result.stdout)["checks"]}
    assert {check["status"] for check in checks.values()} == {"pass"}
    assert "Qwen3MoeForCausalLM" in checks["load-returns-a-model"]["message"]


def test_a_model_that_is_none_is_a_mistake_of_usage():
    result = CliRunner().invoke(app, ["plugins", "check", "cpu", "--model", "qwen3_mo"])
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert "no tiny model; did you mean 'qwen3_moe'?" in said


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
