"""A reload while several streams run: each answer is wholly the old model's or the new one's.

In float32, where a sequence gets the same tokens alone and in a batch. In bfloat16 the sums of
batches of different sizes round differently, with and without a reload.
"""

import threading
from pathlib import Path
from typing import Any

import pytest

from service.deployment import Deployment
from service.engine.params import SamplingParams
from tests.deployment.conftest import Make
from tests.deployment.test_reload import changed
from tests.deployment.test_reload import reload
from tests.server.process import wait_for
from tests.support.gates import PATIENCE_S
from tests.support.tiny import save_tiny

PROMPTS = ([1, 2, 3], [9, 8, 7, 6, 5], [40], [11] * 30)
TOKENS = 250


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("other") / "other", "llama", tie=False, seed=5)


def told(serving: Any, prompt: list[int]) -> list[int]:
    stream = serving.engine.submit(prompt, SamplingParams(max_tokens=TOKENS, temperature=0.0))
    tokens: list[int] = []
    while more := stream.read(PATIENCE_S):
        tokens += more
    return tokens


def alone(deployment: Deployment) -> list[list[int]]:
    """What each prompt is answered while nothing else runs."""
    serving = deployment.serving()
    return [told(serving, prompt) for prompt in PROMPTS]


def test_every_stream_beside_others_is_all_of_one_model_through_a_reload(
    make: Make, other: Path
) -> None:
    deployment = make(max_context=320, max_sequences=len(PROMPTS)).settle()
    expected = {"tiny": alone(deployment)}
    stop = threading.Event()
    answers: list[tuple[str, int, list[int]]] = []
    failures: list[BaseException] = []

    def ask(which: int) -> None:
        try:
            while not stop.is_set():
                serving = deployment.use()
                try:
                    answers.append((serving.model_id, which, told(serving, PROMPTS[which])))
                finally:
                    serving.uses.leave()
        except BaseException as error:
            failures.append(error)
            raise

    def wait_answered(name: str) -> None:
        """Every prompt is answered by this model once more, or something has failed."""
        begun = len(answers)

        def probe() -> bool:
            seen = {which for model, which, _ in answers[begun:] if model == name}
            return bool(failures) or seen == set(range(len(PROMPTS)))

        wait_for(f"answers of {name}", probe)

    phases: list[str] = []

    def in_the_middle(doing: str) -> None:
        phases.append(doing.partition(" ")[0])
        if phases[-1] in ("planning", "loading"):
            wait_answered("tiny")

    asking = [threading.Thread(target=ask, args=(which,)) for which in range(len(PROMPTS))]
    for thread in asking:
        thread.start()
    try:
        reload(deployment, changed(deployment.config, model=str(other)), in_the_middle)
        wait_answered("other")
    finally:
        stop.set()
        for thread in asking:
            thread.join(PATIENCE_S)
    assert failures == []
    assert phases[:2] == ["planning", "loading"]
    expected["other"] = alone(deployment)
    for of_old, of_new in zip(expected["tiny"], expected["other"], strict=True):
        assert of_old != of_new
    for model, which, tokens in answers:
        assert tokens == expected[model][which], f"prompt {which} of {model}"
