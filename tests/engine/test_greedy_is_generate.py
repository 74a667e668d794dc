"""Greedy answers equal `model.generate`'s token for token in float32, whatever runs beside them."""

from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel

from service.engine.engine import Engine
from service.engine.runner import Runner
from service.engine.sequence import SamplingParams
from tests.engine.scripted import greedy
from tests.engine.scripted import read_all
from tests.support.tiny import ARCHITECTURES
from tests.support.tiny import IM_END
from tests.support.tiny import SLIDING_WINDOW
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_model

CHUNK = 16
NEW_TOKENS = 20
# Shorter than the sliding window, between window and chunk, a chunk exactly, and several chunks.
PROMPTS = (
    (65,),
    tuple(range(10, 15)),
    tuple(range(40, 40 + SLIDING_WINDOW + 3)),
    tuple(range(100, 100 + CHUNK)),
    tuple(range(30, 80)),
    (7,) * 33,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and a sum's order then cannot vary."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stay(*, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(inputs)


def generated(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """What transformers itself says, without the token that ended it."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] == IM_END else answer


def engine_over(model: PreTrainedModel, *, max_sequences: int = 3, chunk: int = CHUNK) -> Engine:
    runner = Runner(model, stay, max_context=128)
    engine = Engine(runner, max_sequences=max_sequences, max_queue=16, chunk_tokens=chunk)
    engine.start()
    return engine


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_several_interleaved_prompts_get_generates_tokens(arch: str) -> None:
    # Untied, because a tied random model repeats its input, whatever its attention does.
    model = tiny_model(arch, tie=False)
    expected = [generated(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len({token for answer in expected for token in answer}) > 10
    engine = engine_over(model)
    streams = [engine.submit(p, greedy(NEW_TOKENS, stop_ids=[IM_END])) for p in PROMPTS]
    answers = [read_all(stream) for stream in streams]
    engine.close()
    assert answers == expected


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "mistral", "gpt2"])
def test_the_size_of_the_chunks_changes_nothing(arch: str, chunk: int) -> None:
    model = tiny_model(arch, tie=False, seed=3)
    prompt = tuple(range(30, 80))
    engine = engine_over(model, chunk=chunk)
    answer = read_all(engine.submit(prompt, greedy(NEW_TOKENS, stop_ids=[IM_END])))
    engine.close()
    assert answer == generated(model, prompt, NEW_TOKENS)


def test_the_sliding_window_of_the_tiny_mistral_matters_so_that_the_tests_above_see_it() -> None:
    prompt = tuple(range(30, 80))
    windowed = tiny_model("mistral", tie=False)
    unlimited = tiny_model("mistral", tie=False, sliding_window=None)
    assert generated(windowed, prompt, NEW_TOKENS) != generated(unlimited, prompt, NEW_TOKENS)


def test_a_model_with_layers_on_disk_answers_as_it_does_in_memory(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie=False, layers=4)
    in_memory = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = [generated(in_memory, prompt, NEW_TOKENS) for prompt in PROMPTS]
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={
            "model.embed_tokens": "disk",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "cpu",
            "model.layers.3": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "disk",
        },
        offload_folder=tmp_path / "offload",
    )
    assert offloaded.device.type == "meta"  # where inputs would go by the obvious code
    engine = engine_over(offloaded)
    streams = [engine.submit(p, greedy(NEW_TOKENS, stop_ids=[IM_END])) for p in PROMPTS]
    answers = [read_all(stream) for stream in streams]
    engine.close()
    assert answers == expected


def test_a_seeded_answer_is_the_same_alone_and_among_others() -> None:
    model = tiny_model("qwen3", tie=False)
    params = SamplingParams(max_tokens=30, temperature=1.0, top_k=50, top_p=0.9, seed=11)
    engine = engine_over(model, max_sequences=4)
    alone = read_all(engine.submit(PROMPTS[1], params))
    others = [engine.submit(p, SamplingParams(max_tokens=30)) for p in PROMPTS[2:4]]
    among = engine.submit(PROMPTS[1], params)
    others.append(engine.submit(PROMPTS[4], SamplingParams(max_tokens=30, seed=11)))
    assert read_all(among) == alone
    for stream in others:
        read_all(stream)
    engine.close()
    assert len(set(alone)) > 5
