"""Captured steps give what the model gives, with prompts in them and without."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from service.engine.engine import Engine
from service.engine.runner import Runner
from service.errors import NonFiniteLogits
from service.placement.inputs import to_input_device
from tests.engine.models import CARRIED
from tests.engine.models import generated
from tests.engine.models import model_of
from tests.engine.scripted import greedy
from tests.engine.scripted import idle
from tests.engine.scripted import read_all
from tests.support.tiny import IM_END

pytestmark = pytest.mark.gpu
CONTEXT = 128
# most tokens of a step: prompts are computed in pieces beside others' answers
STEP = 64
NEW_TOKENS = 20
PROMPTS = ((65,), tuple(range(10, 15)), tuple(range(40, 59)), tuple(range(30, 80)), (7,) * 100)
# what transformers 5.23 makes of experts waits for the device
WAITING = ("mixtral",)


@contextmanager
def started(model: Any, *, sequences: int = 3) -> Iterator[Engine]:
    runner = Runner(
        model, to_input_device, max_context=CONTEXT, max_sequences=sequences, step_tokens=STEP
    )
    engine = Engine(runner, max_queue=64)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("arch", CARRIED)
def test_answers_are_generates_and_no_step_is_launched_kernel_by_kernel(arch: str):
    model = model_of(arch).to("cuda")
    expected = [generated(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    with started(model) as engine:
        path = engine._runner.path
        captured = path.graphs is not None
        print(arch, "captured" if captured else "not captured")
        assert captured or arch in WAITING
        if captured:
            path.segments._run = unexpected
        for _ in range(2):  # the second time with beginnings that are kept
            streams = [
                engine.submit(prompt, greedy(NEW_TOKENS, stop_ids=[IM_END])) for prompt in PROMPTS
            ]
            assert [read_all(stream) for stream in streams] == expected
        assert idle(engine)


def unexpected(**inputs: object) -> None:
    raise AssertionError(f"launched kernel by kernel: {inputs}")


def test_a_sequence_that_is_no_number_leaves_nothing_to_those_after_it():
    """Rows of padding hold what was there before; nobody looks at them."""
    model = model_of("llama").to("cuda")
    expected = [generated(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    unused = next(token for token in range(200, 300) if not any(token in its for its in expected))
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = float("nan")
    with started(model, sequences=2) as engine:
        broken = engine.submit((unused,) * 60, greedy(4))
        with pytest.raises(NonFiniteLogits):
            read_all(broken)
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            stream = engine.submit(prompt, greedy(NEW_TOKENS, stop_ids=[IM_END]))
            assert read_all(stream) == answer
        assert idle(engine)
