"""The strategies in examples/, the way their reader would use them: from a config to tokens."""

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from service.config import reading
from service.config.flags import Flags
from service.config.schema import Config
from service.deployment import Deployment
from service.errors import ConfigError
from service.errors import PlacementUnavailable
from service.placement import certificate
from service.placement import loading
from service.placement import registry
from service.placement import watch
from service.testing import case
from service.testing.machines import cards
from service.testing.machines import ram
from tests.support.asked import asked
from tests.support.asked import plain_tokens
from tests.support.planned import GIB
from tests.support.planned import model_config
from tests.support.tiny import save_tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "m", "llama", layers=6, tie=True)


def example(cache: Path, model: Path, *settings: tuple[str, str, str]) -> Config:
    """examples/moorage.yaml with another model: flags and environment, as on the command line."""
    return reading.load(
        EXAMPLES / "moorage.yaml",
        {"MOORAGE_MODEL": str(model), "MOORAGE_CACHE": str(cache)},
        Flags(settings=(("max_context", "64", "--set"), *settings)),
    )


def on(document: dict[str, Any], device: str) -> dict[str, Any]:
    found: dict[str, Any] = next(d for d in document["devices"] if d["id"] == device)
    return found


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "moe", "qwen3_moe", layers=3)


STRATEGIES = sorted((EXAMPLES / "strategies").glob("*.py"))


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_every_example_is_short_enough_to_read(path: Path):
    assert len(path.read_text().splitlines()) < 100


def test_layers_on_disk_say_what_a_model_in_ram_says(tmp_path: Path, folder: Path):
    config = example(tmp_path, folder, ("options.layers", "2", "--set"))
    with asked(config) as (tokens, document):
        assert tokens == plain_tokens(folder, 12)
    assert document["strategy"]["name"] == "disk-layers"
    assert document["strategy"]["source"] == str(EXAMPLES / "strategies" / "disk_layers.py")
    assert document["attempts"] == []
    on_disk = on(document, "disk")
    assert on_disk["modules"][0]["name"] == "model.layers.4-5"
    assert on_disk["measured"]["allocated"] == on_disk["planned"]["weights"]


# --- experts apart


def test_experts_on_disk_say_what_a_model_in_ram_says(tmp_path: Path, mixture: Path):
    config = example(
        tmp_path,
        mixture,
        ("strategy", "experts-apart", "--set"),
        ("options", "{experts: disk}", "--set"),
    )
    with asked(config) as (tokens, document):
        assert tokens == plain_tokens(mixture, 12)
    assert [m["name"] for m in on(document, "disk")["modules"]] == ["model.layers.0-2.mlp.experts"]
    assert "model.layers.0-2.self_attn" in [m["name"] for m in on(document, "cpu")["modules"]]


def test_experts_go_on_the_second_card_or_in_ram(mixture: Path):
    strategy = case.find(str(EXAMPLES / "strategies" / "experts_apart.py"))
    config = registry.settle(model_config(mixture), strategy, {})
    two = strategy.plan(config, cards(24 * GIB, 24 * GIB))
    assert two.memory["cuda:1"].weights > two.memory["cuda:0"].weights
    assert two.allows == frozenset()
    one = strategy.plan(config, cards(24 * GIB))
    assert one.memory["cpu"].weights == two.memory["cuda:1"].weights
    assert one.allows == {"offload"}


def test_a_model_without_experts_is_said_to_have_none(folder: Path):
    strategy = case.find(str(EXAMPLES / "strategies" / "experts_apart.py"))
    config = registry.settle(model_config(folder), strategy, {})
    assert "tiny has no experts: all of it is on cpu." in strategy.plan(config, ram(GIB)).notes


# --- first layers in RAM


def test_first_layers_rest_in_ram_beside_a_card(folder: Path):
    strategy = case.find(str(EXAMPLES / "strategies" / "first_layers_on_cpu.py"))
    config = registry.settle(model_config(folder, options={"layers": 2}), strategy, {})
    made = strategy.plan(config, cards(24 * GIB))
    in_ram = [name for name, device in made.module_map.items() if device == "cpu"]
    assert in_ram == ["model.layers.0", "model.layers.1"]
    assert made.allows == {"offload"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to serve with")
def test_without_a_card_first_layers_hands_over_to_the_next_strategy(tmp_path: Path, folder: Path):
    config = example(
        tmp_path,
        folder,
        ("strategy", "first-layers-on-cpu", "--set"),
        ("options", "{layers: 1}", "--set"),
        ("fallback", "[cpu]", "--set"),
    )
    with asked(config) as (tokens, document):
        assert tokens == plain_tokens(folder, 12)
    assert document["strategy"]["name"] == "cpu"
    (attempt,) = document["attempts"]
    assert "needs a GPU, and there is none (F19)" in str(attempt)


# --- int8 by torchao


def test_torchao_serves_every_linear_in_8_bits(tmp_path: Path, folder: Path):
    pytest.importorskip("torchao")
    config = example(
        tmp_path,
        folder,
        ("strategy", "int8-torchao", "--set"),
        ("options", "{}", "--set"),
        ("quantize", "int8", "--set"),
    )
    with asked(config) as (tokens, document):
        assert len(tokens) == 12
    quantised = next(c for c in document["certificate"]["checks"] if c["class"] == "F13")
    assert quantised["checked"] == 6 * 7  # layers, linears of each
    memory = on(document, "cpu")
    measured, weights = memory["measured"]["allocated"], memory["planned"]["weights"]
    assert abs(measured - weights) < 0.05 * weights


def test_the_watch_sees_into_torchaos_weights(folder: Path):
    pytest.importorskip("torchao")
    strategy = case.find(str(EXAMPLES / "strategies" / "int8_torchao.py"))
    config = registry.settle(model_config(folder), strategy, {})
    placement = strategy.plan(config, ram(GIB))
    loaded = loading.load(strategy, config, placement, lambda share: None)
    assert certificate.certify(loaded).valid
    seen = watch.Watch(loaded.model, 60.0)
    assert seen.look(thorough=True) is None
    weight = loaded.model.get_submodule("model.layers.3.mlp.up_proj").weight
    with torch.no_grad():
        weight.scale.fill_(float("nan"))
    error = seen.look(thorough=True)
    assert error is not None
    assert error.failure_class == "F16"
    assert error.tensors == ("model.layers.3.mlp.up_proj.weight",)


def test_without_torchao_the_refusal_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else real(name)
    )
    strategy = case.find(str(EXAMPLES / "strategies" / "int8_torchao.py"))
    config = registry.settle(model_config(folder), strategy, {})
    with pytest.raises(PlacementUnavailable, match="needs torchao, which is not installed") as told:
        strategy.plan(config, ram(GIB))
    assert told.value.hint == "pip install torchao"


# --- mistakes


def test_an_option_of_the_example_is_checked_where_it_was_written(tmp_path: Path, folder: Path):
    deployment = Deployment(example(tmp_path, folder, ("options.layer", "2", "--set")))
    failed = threading.Event()
    deployment.on_failure = lambda error: failed.set()
    deployment.start()
    assert failed.wait(60)
    assert isinstance(deployment.error, ConfigError)
    assert str(deployment.error) == (
        "flag --set: options.layer: strategy disk-layers has no such option; did you mean 'layers'?"
    )
    assert deployment.state == "failed"


def test_where_torchao_is_installed_nobody_is_told_what_it_does_without():
    pytest.importorskip("torchao")
    code = "import service, sys, transformers.modeling_utils; print('torchao' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=EXAMPLES.parent,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
