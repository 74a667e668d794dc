"""DEVICE_MAP and QUANTIZE mean what they always meant, with a notice."""

from pathlib import Path

import pytest

from service.config import old_names
from tests.config.conftest import Load
from tests.config.conftest import Refusal

FILE = "version: 1\ndeployments:\n  a:\n    strategy: cpu\n    quantize: fp4\n"


@pytest.mark.parametrize(
    ("value", "strategy", "options"),
    [
        ("auto", "auto-shard", {}),
        ("single", "single-gpu", {}),
        ("cuda", "single-gpu", {}),
        ("gpu", "single-gpu", {}),
        ("cuda:0", "single-gpu", {"device": 0}),
        ("cuda:3", "single-gpu", {"device": 3}),
        ("cpu", "cpu", {}),
        (" CUDA:1 ", "single-gpu", {"device": 1}),
        ("Auto", "auto-shard", {}),
    ],
)
def test_device_map_chooses_the_strategy(
    load: Load, value: str, strategy: str, options: dict[str, int]
) -> None:
    config = load(FILE, {"DEVICE_MAP": value})
    assert config.deployment.strategy == strategy
    assert config.deployment.options == options
    assert str(config.origins["strategy"]) == "env DEVICE_MAP"
    assert config.notices == (
        "DEVICE_MAP is set in the environment and overrides moorage.yaml:4. "
        "New name: MOORAGE_STRATEGY.",
    )


@pytest.mark.parametrize("value", ["none", "off", "NONE"])
def test_no_device_map_means_a_gpu_if_there_is_one(load: Load, value: str) -> None:
    assert load(FILE, {"DEVICE_MAP": value}).deployment.strategy == "cpu"
    with_gpu = load(FILE, {"DEVICE_MAP": value}, accelerator=True)
    assert with_gpu.deployment.strategy == "single-gpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_hidden_gpu_is_no_gpu(load: Load, hidden: str) -> None:
    env = {"DEVICE_MAP": "none", "CUDA_VISIBLE_DEVICES": hidden}
    assert load(FILE, env, accelerator=True).deployment.strategy == "cpu"


@pytest.mark.parametrize(
    ("value", "quantize"),
    [
        ("4bit", "nf4"),
        ("nf4", "nf4"),
        ("bnb-4bit", "nf4"),
        ("bitsandbytes-nf4", "nf4"),
        ("fp4", "fp4"),
        ("8bit", "int8"),
        ("bnb-8bit", "int8"),
        ("none", "none"),
        ("4BIT", "nf4"),
    ],
)
def test_quantize_chooses_the_format(load: Load, value: str, quantize: str) -> None:
    config = load(FILE, {"QUANTIZE": value})
    assert config.deployment.quantize == quantize
    assert config.notices == (
        "QUANTIZE is set in the environment and overrides moorage.yaml:5. "
        "New name: MOORAGE_QUANTIZE.",
    )


@pytest.mark.parametrize("name", ["DEVICE_MAP", "QUANTIZE"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_old_variable_is_not_set(load: Load, name: str, value: str) -> None:
    config = load(FILE, {name: value})
    assert (config.deployment.strategy, config.deployment.quantize) == ("cpu", "fp4")
    assert config.notices == ()


def test_an_unknown_value_lists_the_valid_ones(refusal: Refusal) -> None:
    error = refusal(FILE, {"DEVICE_MAP": "balanced", "QUANTIZE": "nf5"})
    first, second = (str(problem) for problem in error.problems)
    assert first == (
        "env DEVICE_MAP: 'balanced' is unknown; "
        "valid: auto, single, cuda, gpu, cpu, cuda:N, none, off"
    )
    assert second.startswith(
        "env QUANTIZE: 'nf5' is unknown; did you mean 'nf4'? Valid: none, 4bit"
    )
    assert error.exit_status == 3


def test_the_new_name_wins_over_the_old_one_and_the_notice_says_so(load: Load) -> None:
    config = load(FILE, {"DEVICE_MAP": "auto", "MOORAGE_STRATEGY": "single-gpu"})
    assert config.deployment.strategy == "single-gpu"
    assert config.notices == (
        "DEVICE_MAP is set in the environment, but env MOORAGE_STRATEGY overrides it. "
        "New name: MOORAGE_STRATEGY.",
    )


def test_without_a_file_there_is_nothing_to_override(load: Load) -> None:
    assert load(None, {"QUANTIZE": "4bit"}).notices == (
        "QUANTIZE is set in the environment. New name: MOORAGE_QUANTIZE.",
    )


def test_the_device_of_the_old_name_does_not_reach_another_strategy(load: Load) -> None:
    config = load(FILE, {"DEVICE_MAP": "cuda:1", "MOORAGE_STRATEGY": "cpu"})
    assert config.deployment.options == {}
    assert any("options from env DEVICE_MAP" in notice for notice in config.notices)


def test_the_device_of_the_old_name_joins_options_of_the_same_strategy(load: Load) -> None:
    text = "version: 1\ndeployments: {a: {strategy: single-gpu, options: {device: 0, x: 1}}}\n"
    config = load(text, {"DEVICE_MAP": "cuda:1"})
    assert config.deployment.options == {"device": 1, "x": 1}


@pytest.mark.parametrize(
    ("files", "present"),
    [
        ((), False),
        (("nvidiactl", "nvidia-uvm", "null"), False),
        (("nvidia0", "nvidiactl"), True),
        (("nvidia11",), True),
    ],
)
def test_an_accelerator_is_found_by_its_device_file(
    tmp_path: Path, files: tuple[str, ...], present: bool
) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert old_names.accelerator_present(tmp_path) is present
