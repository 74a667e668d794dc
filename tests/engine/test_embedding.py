"""Embeddings through the engine of every request: each is what the plain model gives."""

import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from service.engine import pooling
from service.engine.embedding import EmbeddingRunner
from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.sequence import Stream
from service.errors import ContextTooLong
from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.errors import InvalidRequest
from service.errors import LoadFailed
from service.errors import NonFiniteLogits
from service.errors import Overloaded
from service.errors import PluginError
from service.errors import StepFailed
from service.models.sentence_files import SentenceFiles
from tests.support.encoders import tiny_encoder
from tests.support.tiny import tiny_model

POOLED = SamplingParams(max_tokens=0, pooled=True)
TIMEOUT_S = 60.0
PLAIN = SentenceFiles()
BAD = 7  # a token that tests give a meaning of its own
# of every length, some the same, in no order; none has BAD
TEXTS = [
    tuple(10 + (at * 5 + i) % 200 for i in range(n)) for at, n in enumerate((9, 1, 120, 9, 33))
]

Make = Callable[..., Engine]


def same_place(
    *, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return dict(inputs)


@pytest.fixture
def start() -> Iterator[Make]:
    """start(model, pooling=..., max_sequences=...): a running engine, closed at the end."""
    engines: list[Engine] = []

    def make(
        model: PreTrainedModel,
        files: SentenceFiles = PLAIN,
        *,
        max_sequences: int = 8,
        max_queue: int = 64,
        place_inputs: Any = same_place,
        **more: Any,
    ) -> Engine:
        runner = EmbeddingRunner(
            model, place_inputs, files, max_context=4096, max_sequences=max_sequences
        )
        engine = Engine(runner, max_queue=max_queue, **more)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.close()


def submit(engine: Engine, *texts: tuple[int, ...], **more: Any) -> list[Stream]:
    return engine.submit_all([(ids, POOLED) for ids in texts], **more)


def row_of(stream: Stream) -> "np.ndarray[Any, Any]":
    assert stream.read(TIMEOUT_S) == []
    assert stream.embedding is not None
    return np.frombuffer(stream.embedding, "<f4")


def alone(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """Hidden states [tokens, size] of the model called as its documentation says."""
    with torch.inference_mode():
        states: torch.Tensor = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return states


BY_HAND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "max": lambda states: states.max(0).values,
    "last": lambda states: states[-1],
}


@pytest.mark.parametrize("how", BY_HAND)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_batch_of_mixed_lengths_is_what_the_model_gives_each_alone(
    start: Make, how: Any, normalize: bool
) -> None:
    model = tiny_encoder("bert")
    engine = start(model, SentenceFiles(how, normalize))
    for ids, stream in zip(TEXTS, submit(engine, *TEXTS), strict=True):
        expected = BY_HAND[how](alone(model, ids))
        if normalize:
            expected = expected / expected.norm()
        assert np.abs(row_of(stream) - expected.numpy()).max() < 1e-5
    assert engine.stats().steps == 1
    assert engine.stats().tokens == 0
    assert engine.stats().prompt_tokens == sum(map(len, TEXTS))


@pytest.mark.parametrize(
    "arch",
    ["roberta", "mpnet", "distilbert", "albert", "electra", "modernbert", "deberta-v2", "qwen3"],
)
def test_so_it_is_of_every_architecture(start: Make, arch: str) -> None:
    model = tiny_encoder(arch)
    engine = start(model, SentenceFiles("last" if arch == "qwen3" else "mean", False))
    assert engine.path == "padded"
    for ids, stream in zip(TEXTS, submit(engine, *TEXTS), strict=True):
        states = alone(model, ids)
        expected = states[-1] if arch == "qwen3" else states.mean(0)
        assert np.abs(row_of(stream) - expected.numpy()).max() < 1e-5


def test_the_longest_text_that_a_table_of_positions_has_room_for_is_computed(start: Make) -> None:
    """RoBERTa's positions begin behind the padding id."""
    model = tiny_encoder("roberta")
    engine = start(model)
    longest = tuple([20] * 128)
    found, short = submit(engine, longest, (20,))
    expected = alone(model, longest).mean(0)
    assert np.abs(row_of(found) - (expected / expected.norm()).numpy()).max() < 1e-5
    assert len(row_of(short)) == len(row_of(found))
    with pytest.raises(ContextTooLong, match="maximum context length is 128 tokens"):
        submit(engine, (*longest, 20))


def test_a_model_that_mixes_padding_in_is_run_one_text_at_a_time(start: Make) -> None:
    model = tiny_encoder("fnet")
    engine = start(model)
    assert engine.path == "alone"
    assert "off from those alone" in str(engine.describe()["why"])
    for ids, stream in zip(TEXTS, submit(engine, *TEXTS), strict=True):
        expected = alone(model, ids).mean(0)
        assert np.abs(row_of(stream) - (expected / expected.norm()).numpy()).max() < 1e-5


def test_texts_of_like_length_share_a_forward_under_a_budget_of_tokens(start: Make) -> None:
    model = tiny_encoder("bert")
    engine = start(model, max_sequences=16)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    texts = [tuple([20] * n) for n in (130, 3, 128, 2, 129, 127, 4, 126)]
    for stream in submit(engine, *texts):
        row_of(stream)
    assert sum(rows for rows, _ in shapes) == len(texts)
    assert all(rows * longest <= 512 for rows, longest in shapes)
    assert len(shapes) < len(texts)


def poisoned(arch: str = "bert") -> PreTrainedModel:
    """Its embedding of BAD is NaN."""
    model = tiny_encoder(arch)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    return model


def test_what_is_not_a_number_fails_its_own_text_only(start: Make) -> None:
    engine = start(poisoned())
    good, bad, other = submit(engine, (10, 11, 12), (10, BAD, 12), (10, 11))
    with pytest.raises(NonFiniteLogits, match="for this input"):
        bad.read(TIMEOUT_S)
    assert np.isfinite(row_of(good)).all()
    assert np.isfinite(row_of(other)).all()
    assert engine.stats().failed == 1


def test_a_text_on_which_the_model_raises_fails_alone(start: Make) -> None:
    model = tiny_encoder("bert")

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if (kwargs["input_ids"] == BAD).any():
            raise RuntimeError("not this one")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    engine = start(model)
    good, bad, other = submit(engine, (10, 11, 12), (10, BAD, 12), (10, 11))
    with pytest.raises(StepFailed):
        bad.read(TIMEOUT_S)
    assert len(row_of(good)) == len(row_of(other)) == 64


def test_a_prompt_to_continue_is_refused_and_harms_no_text(start: Make) -> None:
    engine = start(tiny_encoder("bert"))
    prompt, text = engine.submit_all([((10, 11), SamplingParams(max_tokens=4)), ((10,), POOLED)])
    with pytest.raises(InvalidRequest, match="gives embeddings; it continues no text"):
        prompt.read(TIMEOUT_S)
    assert len(row_of(text)) == 64


def test_a_full_queue_is_told(start: Make) -> None:
    held = Held()
    engine = start(held.model(), max_sequences=1, max_queue=1)
    held.hold()
    try:
        first = submit(engine, (10, 11))
        held.wait_inside()
        second = submit(engine, (12, 13))
        with pytest.raises(Overloaded):
            submit(engine, (14, 15))
    finally:
        held.go()
    assert len(row_of(first[0])) == len(row_of(second[0])) == 64


def test_a_cancelled_text_and_one_that_is_late_leave_the_queue_uncomputed(start: Make) -> None:
    held = Held()
    now = [0.0]
    engine = start(held.model(), max_sequences=1, clock=lambda: now[0])
    held.hold()
    try:
        (first,) = submit(engine, (10, 11))
        held.wait_inside()
        (cancelled,) = submit(engine, (12, 13))
        (late,) = submit(engine, (14, 15), deadline=5.0)
        cancelled.cancel()
        now[0] = 6.0
    finally:
        held.go()
    assert len(row_of(first)) == 64
    assert cancelled.read(TIMEOUT_S) == []
    assert cancelled.embedding is None
    with pytest.raises(DeadlineExceeded):
        late.read(TIMEOUT_S)
    assert engine.stats().prompt_tokens == 2


class Held:
    """A model whose forwards can be made to wait."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._inside = threading.Event()

    def model(self) -> PreTrainedModel:
        found = tiny_encoder("bert")
        found.register_forward_pre_hook(self._wait)
        return found

    def _wait(self, module: Any, args: Any) -> None:
        if not self._open.is_set():
            self._inside.set()
            self._open.wait(TIMEOUT_S)

    def hold(self) -> None:
        self._open.clear()

    def wait_inside(self) -> None:
        assert self._inside.wait(TIMEOUT_S)

    def go(self) -> None:
        self._open.set()


def test_a_model_that_breaks_while_it_serves_ends_the_engine(
    start: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model, died = tiny_encoder("bert"), threading.Event()
    engine = start(model, on_death=lambda error: died.set())

    def broken(module: Any, args: Any) -> None:
        raise RuntimeError("broken")

    model.register_forward_pre_hook(broken)
    for error in (StepFailed, StepFailed, EngineStopped):
        (stream,) = submit(engine, (10, 11))
        with pytest.raises(error):
            stream.read(TIMEOUT_S)
    assert died.wait(TIMEOUT_S)
    assert not engine.alive
    assert "the engine thread died" in caplog.text


def test_a_model_with_its_head_on_is_refused_at_the_start(start: Make) -> None:
    with pytest.raises(LoadFailed, match="LlamaForCausalLM gives no hidden states") as refused:
        start(tiny_model("llama"))
    assert "auto_class" in (refused.value.hint or "")


def test_a_model_that_gives_no_numbers_is_refused_at_the_start(start: Make) -> None:
    model = tiny_encoder("bert")
    with torch.no_grad():
        next(model.encoder.layer[0].parameters()).fill_(torch.nan)
    with pytest.raises(LoadFailed, match="NaN or infinite"):
        start(model)


def test_a_hook_that_breaks_its_contract_is_named_at_the_start(start: Make) -> None:
    with pytest.raises(PluginError, match="place_inputs returned"):
        start(tiny_encoder("bert"), place_inputs=lambda *, model, inputs: {})


def test_another_thread_may_not_run_the_model(start: Make) -> None:
    runner = EmbeddingRunner(tiny_encoder("bert"), same_place, SentenceFiles(), max_context=64)
    thread = threading.Thread(target=runner.open)
    thread.start()
    thread.join(TIMEOUT_S)
    with pytest.raises(RuntimeError, match="F6"):
        runner.try_out()


def test_inputs_are_placed_once_a_forward(start: Make) -> None:
    placed, run = [0], [0]
    model = tiny_encoder("bert")

    def place_inputs(
        *, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        placed[0] += 1
        assert set(inputs) == {"input_ids", "attention_mask"}
        return dict(inputs)

    def count(module: Any, args: Any) -> None:
        run[0] += 1

    model.register_forward_pre_hook(count)
    engine = start(model, place_inputs=place_inputs)
    for stream in submit(engine, *TEXTS):
        row_of(stream)
    assert placed == run
    assert placed[0] > 0


def test_padding_that_is_not_a_number_stays_out_of_a_mean_and_a_maximum() -> None:
    states = torch.tensor([[[1.0], [3.0], [torch.nan]], [[-4.0], [-2.0], [-6.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pooling.pool(states, mask, "mean").tolist() == [[2.0], [-4.0]]
    assert pooling.pool(states, mask, "max").tolist() == [[3.0], [-2.0]]
    assert pooling.pool(states, mask, "last").tolist() == [[3.0], [-6.0]]
    assert pooling.pool(states, mask, "cls").tolist() == [[1.0], [-4.0]]


def test_half_precision_is_pooled_in_single() -> None:
    states = torch.full((1, 4096, 2), 1.001, dtype=torch.bfloat16)
    found = pooling.pool(states, torch.ones(1, 4096, dtype=torch.int64), "mean")
    assert found.dtype == torch.float32
    assert found[0, 0] == states[0, 0, 0].float()
