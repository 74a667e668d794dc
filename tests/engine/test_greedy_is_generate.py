"""Greedy answers equal `model.generate`'s token for token in float32, whatever runs beside them."""

from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from tests.engine.models import CARRIED
from tests.engine.models import engine_over
from tests.engine.models import generated
from tests.engine.models import mamba
from tests.engine.models import model_of
from tests.engine.models import t5
from tests.engine.scripted import greedy
from tests.engine.scripted import idle
from tests.engine.scripted import read_all
from tests.support.tiny import IM_END
from tests.support.tiny import SLIDING_WINDOW
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_model

STEP = 16
NEW_TOKENS = 20
# Shorter than the sliding window, between window and step, a step exactly, and several steps.
PROMPTS = (
    (65,),
    tuple(range(10, 15)),
    tuple(range(40, 40 + SLIDING_WINDOW + 3)),
    tuple(range(100, 100 + STEP)),
    tuple(range(30, 80)),
    (7,) * 33,
)

Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts engines and closes them after the test."""
    engines: list[Engine] = []

    def start(model: PreTrainedModel, **settings: object) -> Engine:
        engine = engine_over(model, **settings)  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()


def answers(
    engine: Engine, prompts: tuple[tuple[int, ...], ...], count: int = NEW_TOKENS
) -> list[list[int]]:
    """To all prompts at once."""
    streams = [engine.submit(prompt, greedy(count, stop_ids=[IM_END])) for prompt in prompts]
    return [read_all(stream) for stream in streams]


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
@pytest.mark.parametrize("arch", CARRIED)
def test_prompts_alone_and_together_get_generates_tokens(
    arch: str, paged: bool, start: Start
) -> None:
    model = model_of(arch)
    expected = [generated(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len({token for answer in expected for token in answer}) > 10
    engine = start(model, paged=paged)
    assert engine.path == "ragged"
    assert answers(engine, PROMPTS) == expected
    for prompt, answer in zip(PROMPTS[3:5], expected[3:5], strict=True):
        assert answers(engine, (prompt,)) == [answer]
    assert idle(engine)


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
@pytest.mark.parametrize("arch", CARRIED)
def test_a_beginning_that_was_computed_before_changes_no_token(
    arch: str, paged: bool, start: Start
) -> None:
    model = model_of(arch, seed=1)
    common = tuple(range(20, 90))
    prompts = ((*common, 3, 4), (*common, 200, 201, 202), common[:66])
    expected = [generated(model, prompt, NEW_TOKENS) for prompt in prompts]
    engine = start(model, paged=paged, step_tokens=64, max_sequences=2)
    assert answers(engine, prompts[:1]) == expected[:1]
    assert answers(engine, prompts[1:]) == expected[1:]
    if getattr(model.config, "sliding_window", None) and not paged:  # a ring forgets
        assert engine.stats().prefix_tokens == 0
    else:
        assert engine.stats().prefix_tokens > 0


@pytest.mark.parametrize("arch", CARRIED)
def test_a_sequence_that_gave_way_gets_generates_tokens(arch: str, start: Start) -> None:
    model = model_of(arch, seed=2)
    prompts = (tuple(range(10, 60)), tuple(range(90, 145)))
    expected = [generated(model, prompt, 30) for prompt in prompts]
    # the two grow to four pages together, and there are three
    engine = start(model, paged=True, kv_tokens=192, max_sequences=2, step_tokens=64)
    streams = [engine.submit(prompt, greedy(30, stop_ids=[])) for prompt in prompts]
    found = [read_all(stream) for stream in streams]
    assert engine.stats().preemptions > 0
    for answer, wanted in zip(found, expected, strict=True):
        assert answer[: len(wanted)] == wanted
        assert len(answer) == 30
    assert idle(engine)


@pytest.mark.parametrize("step_tokens", [1, 5, 64])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "mistral", "gpt2"])
def test_the_size_of_the_steps_changes_nothing(arch: str, step_tokens: int, start: Start) -> None:
    model = model_of(arch, seed=3)
    expected = generated(model, PROMPTS[4], NEW_TOKENS)
    assert answers(start(model, step_tokens=step_tokens), PROMPTS[4:5]) == [expected]


def test_the_sliding_window_of_the_tiny_mistral_matters_so_that_the_tests_above_see_it() -> None:
    windowed = model_of("mistral")
    unlimited = tiny_model("mistral", tie=False, sliding_window=None)
    answer = generated(windowed, PROMPTS[4], NEW_TOKENS)
    assert answer != generated(unlimited, PROMPTS[4], NEW_TOKENS)


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
def test_a_model_with_layers_on_disk_answers_as_it_does_in_memory(
    tmp_path: Path, paged: bool, start: Start
) -> None:
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
    engine = start(offloaded, paged=paged)
    assert engine.path == "ragged"
    assert answers(engine, PROMPTS) == expected


# --- the plain path


@pytest.mark.parametrize("make", [mamba, t5])
def test_models_that_the_fast_path_does_not_carry_get_generates_tokens(
    make: Callable[[], PreTrainedModel], start: Start
) -> None:
    model = make()
    expected = [generated(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len({token for answer in expected for token in answer}) > 10
    engine = start(model)
    assert engine.path == "plain"
    assert answers(engine, PROMPTS) == expected
    assert answers(engine, PROMPTS[4:5]) == expected[4:5]
    assert idle(engine)


# --- several answers, seeds


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
def test_a_seeded_answer_is_the_same_alone_and_among_others(paged: bool, start: Start) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, top_k=50, top_p=0.9, seed=11)
    engine = start(model_of("qwen3"), max_sequences=4, paged=paged)
    alone = read_all(engine.submit(PROMPTS[1], params))
    others = [engine.submit(p, SamplingParams(max_tokens=30)) for p in PROMPTS[2:4]]
    among = engine.submit(PROMPTS[1], params)
    others.append(engine.submit(PROMPTS[4], SamplingParams(max_tokens=30, seed=11)))
    assert read_all(among) == alone
    for stream in others:
        read_all(stream)
    assert len(set(alone)) > 5


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
def test_several_answers_to_one_prompt_differ_and_come_again_with_the_seed(
    paged: bool, start: Start
) -> None:
    engine = start(model_of("llama"), max_sequences=4, step_tokens=64, paged=paged)
    prompt = tuple(range(20, 90))
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5)

    def ask() -> list[list[int]]:
        return [read_all(stream) for stream in engine.submit_all([(prompt, params)] * 3)]

    first = ask()
    assert len({tuple(answer) for answer in first}) == 3
    stats = engine.stats()
    # a page of the prompt, or all but its last token
    shared = 64 if paged else len(prompt) - 1
    assert stats.prefix_tokens == 2 * shared
    assert stats.prompt_tokens == len(prompt) + 2 * (len(prompt) - shared)
    assert ask() == first


def test_a_seeded_answer_is_the_same_when_its_sequence_gave_way(start: Start) -> None:
    prompts = (tuple(range(10, 60)), tuple(range(90, 145)))
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, presence_penalty=0.5)
    roomy = start(model_of("llama"), paged=True, max_sequences=2, step_tokens=64)
    expected = [read_all(roomy.submit(prompt, params)) for prompt in prompts]
    narrow = start(model_of("llama"), paged=True, kv_tokens=192, max_sequences=2, step_tokens=64)
    streams = [narrow.submit(prompt, params) for prompt in prompts]
    assert [read_all(stream) for stream in streams] == expected
    assert narrow.stats().preemptions > 0


def test_answers_to_one_prompt_without_a_seed_differ_from_request_to_request(start: Start) -> None:
    engine = start(model_of("llama"))
    params = SamplingParams(max_tokens=12, temperature=1.0)
    found = [
        tuple(read_all(stream))
        for _ in range(2)
        for stream in engine.submit_all([(PROMPTS[1], params)] * 2)
    ]
    assert len(set(found)) == 4
