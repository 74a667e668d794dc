"""A deployment of a config, asked once: its tokens and its /placement."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from service.config.schema import Config
from service.deployment import Deployment
from service.engine.params import SamplingParams
from service.errors import ServiceError

PROMPT = list(b"The tide is")


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


@contextmanager
def asked(config: Config) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Twelve greedy tokens of the served example, and its /placement."""
    deployment = served(config)
    try:
        stream = deployment.serving().engine.submit(
            PROMPT, SamplingParams(max_tokens=12, temperature=0.0)
        )
        tokens: list[int] = []
        while some := stream.read(60):
            tokens += some
        document = deployment.document()
        assert document["certificate"]["valid"]
        yield tokens, document
    finally:
        deployment.drain(0)


def plain_tokens(folder: Path, count: int) -> list[int]:
    """Greedy tokens of the whole model in RAM, without hooks and cache."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]
