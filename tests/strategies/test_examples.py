"""The strategy in examples/, the way its reader would use it: from its config to tokens."""

import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.config import reading
from service.config.flags import Flags
from service.config.schema import Config
from service.deployment import Deployment
from service.engine.params import SamplingParams
from service.errors import ConfigError
from service.errors import ServiceError
from tests.support.tiny import save_tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPT = list(b"The tide is")


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


def served(config: Config) -> Deployment:
    """The deployment when it is ready. Fails with the error that ended the start."""
    done = threading.Event()
    failures: list[ServiceError] = []
    deployment = Deployment(config)
    deployment.on_ready = lambda model_id: done.set()
    deployment.on_failure = lambda error: (failures.append(error), done.set())
    deployment.start()
    assert done.wait(120)
    assert not failures, failures[0].one_line()
    return deployment


def plain_tokens(folder: Path, count: int) -> list[int]:
    """Greedy tokens of the whole model in RAM, without hooks and cache."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_the_example_serves_from_disk_what_a_model_in_ram_says(tmp_path: Path, folder: Path):
    deployment = served(example(tmp_path, folder, ("options.layers", "2", "--set")))
    try:
        stream = deployment.serving().engine.submit(
            PROMPT, SamplingParams(max_tokens=12, temperature=0.0)
        )
        tokens: list[int] = []
        while some := stream.read(60):
            tokens += some
        assert tokens == plain_tokens(folder, 12)
        document = deployment.document()
    finally:
        deployment.drain(0)
    assert document["strategy"]["name"] == "disk-layers"
    assert document["strategy"]["source"] == str(EXAMPLES / "strategies" / "disk_layers.py")
    assert document["certificate"]["valid"]
    assert document["attempts"] == []
    on_disk = next(device for device in document["devices"] if device["id"] == "disk")
    assert on_disk["modules"][0]["name"] == "model.layers.4-5"
    assert on_disk["measured"]["allocated"] == on_disk["planned"]["weights"]


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


def test_the_example_is_short_enough_to_read():
    lines = (EXAMPLES / "strategies" / "disk_layers.py").read_text().splitlines()
    assert len(lines) < 60
