"""F6: two threads run a model whose weights come and go through offload hooks.

A hook puts a module's weights in place before its forward and back on meta after it, whoever is
still computing with them.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Batch
from service.placement.certificate import certify
from service.testing.placing import dispatched
from service.testing.self_test.serving import ON_DISK
from service.testing.self_test.serving import interleaved
from tests.support.engines import last_logits
from tests.support.engines import prompt_piece
from tests.support.overlapping import PATIENCE_S
from tests.support.placing import IDS
from tests.support.placing import logits
from tests.support.placing import offloaded
from tests.support.placing import scribble
from tests.support.tiny import save_tiny

LAYER = "model.layers.1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


@pytest.fixture
def expected(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def test_plain_transformers_raises_the_founding_error(folder: Path) -> None:
    """Fails when accelerate's hooks keep the weights of one forward apart from another's."""
    [error] = interleaved(dispatched(folder, ON_DISK), f"{LAYER}.input_layernorm")
    assert isinstance(error, RuntimeError)
    assert "Tensor on device cpu is not on the expected device meta!" in str(error)


@pytest.mark.parametrize("module", [f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"])
def test_plain_transformers_answers_wrong_without_an_error(
    folder: Path, expected: torch.Tensor, module: str
) -> None:
    """Fails as the one above, or when torch refuses meta weights in a product."""
    model = dispatched(folder, ON_DISK)
    torch.testing.assert_close(logits(model), expected)
    scribble(model)
    [values] = interleaved(model, module)
    assert isinstance(values, torch.Tensor)
    assert not torch.allclose(values, expected)


def test_ours_lets_one_thread_run_the_model(folder: Path, expected: torch.Tensor) -> None:
    loaded = offloaded(folder)
    runner = Runner(loaded.model, loaded.strategy.place_inputs, max_context=64)
    refused: list[str] = []

    def intrude() -> None:
        try:
            runner.launch(Batch((), (piece,)))
        except RuntimeError as error:
            refused.append(str(error))

    runner.open()
    piece = prompt_piece(runner, [1, 2, 3])
    values = last_logits(runner, IDS[0].tolist())
    thread = threading.Thread(target=intrude, name="intruder")
    thread.start()
    thread.join(PATIENCE_S)
    assert refused == ["thread intruder tried to run the model of thread MainThread (F6)"]
    torch.testing.assert_close(values, expected[0, -1])


@pytest.fixture
def engine(folder: Path) -> Iterator[tuple[Engine, PreTrainedModel]]:
    loaded = offloaded(folder)
    assert certify(loaded).valid
    runner = Runner(loaded.model, loaded.strategy.place_inputs, max_context=64, max_sequences=4)
    engine = Engine(runner, max_queue=16)
    engine.start()
    yield engine, loaded.model
    engine.close()


def test_many_clients_of_an_offloaded_model_get_the_answers_of_the_model_in_ram(
    folder: Path, engine: tuple[Engine, PreTrainedModel]
) -> None:
    served, model = engine
    threads: set[str] = set()
    model.register_forward_pre_hook(
        lambda module, args: threads.add(threading.current_thread().name)
    )
    prompts = [[7, 1, 250], [33, 64], [9, 9, 9, 9], [200]] * 2
    start = threading.Barrier(len(prompts))
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        start.wait(PATIENCE_S)
        params = SamplingParams(max_tokens=6, temperature=0.0)
        stream = served.submit(prompts[number], params)
        answers[number] = []
        while tokens := stream.read(PATIENCE_S):
            answers[number] += tokens

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for client in clients:
        client.start()
    for client in clients:
        client.join(PATIENCE_S)
    in_ram = AutoModelForCausalLM.from_pretrained(folder)
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        whole = in_ram.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )
        assert answers[number] == whole[0, len(prompt) :].tolist()
    assert threads == {"engine"}
