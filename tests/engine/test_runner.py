"""The model's owner: which path, placement of inputs, the one thread, what it refuses to run."""

import logging
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from service.engine import attention
from service.engine import slot_cache
from service.engine.choosing import Chosen
from service.engine.runner import Runner
from service.engine.scheduler import Batch
from service.engine.scheduler import Piece
from service.engine.sequence import Sequence
from service.errors import LoadFailed
from service.errors import PlacementMismatch
from service.errors import PluginError
from service.placement import kv
from tests.engine.models import CARRIED
from tests.engine.models import generated
from tests.engine.models import mamba
from tests.engine.models import model_of
from tests.engine.models import stay
from tests.engine.models import t5
from tests.engine.sequences import sequence
from tests.support.tiny import HEAD_SIZE
from tests.support.tiny import KV_HEADS
from tests.support.tiny import MAX_CONTEXT
from tests.support.tiny import SLIDING_WINDOW
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_model


class Placing:
    """A strategy's place_inputs for a model on the CPU, which remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, torch.Tensor]] = []

    def __call__(
        self, *, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        self.calls.append(dict(inputs))
        return dict(inputs)


def opened(model: PreTrainedModel, place_inputs: Any = stay, **settings: Any) -> Runner:
    runner = Runner(model, place_inputs, **{"max_context": 64, **settings})
    runner.open()
    return runner


def step(runner: Runner, *pieces: Piece) -> list[int | None]:
    """Run pieces of prompts in one step; their tokens."""
    found: dict[Piece, int | None] = {}
    for piece, result in runner.collect(runner.launch(Batch((), pieces))):
        assert result is None or isinstance(result, Chosen)
        found[piece] = None if result is None else result.token
    return [found[piece] for piece in pieces]


def whole(runner: Runner, *ids: int) -> Piece:
    """A prompt that has its memory, in one piece."""
    one = sequence(ids)
    assert runner.path.memory.admit(one)
    return Piece(one, ids, 0, samples=True)


# --- which path


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
@pytest.mark.parametrize("arch", CARRIED)
def test_ordinary_architectures_take_the_fast_path(arch: str, paged: bool) -> None:
    path = opened(model_of(arch), paged=paged).path
    assert (path.name, path.why) == ("ragged", "")


@pytest.mark.parametrize(
    ("make", "why"), [(mamba, "it has a recurrent state"), (t5, "it is an encoder-decoder")]
)
def test_others_take_the_plain_path_and_the_log_says_why(
    make: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        path = opened(make()).path
    assert (path.name, path.why) == ("plain", why)
    assert why in caplog.text


def test_a_model_that_brings_its_own_attention_takes_the_plain_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    path = opened(model).path
    assert path.name == "plain"
    assert path.why == "LlamaForCausalLM brings an attention function of its own"


def test_attention_with_an_argument_that_is_not_computed_takes_the_plain_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    forward = type(model.model.layers[0].self_attn).forward

    def with_sinks(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs, s_aux=torch.zeros(4))

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", with_sinks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "NOT_COMPUTED", ("s_aux",))
        path = opened(model).path
    assert (path.name, path.why) == ("plain", "LlamaAttention passes s_aux")


def blind(query: Any, key: Any, value: Any, scale: float, mask: Any, cap: Any, **_: Any) -> Any:
    """Attention that sees what comes later."""
    return attention_dense(query, key, value, scale, None, cap)


attention_dense = slot_cache.attend_dense


def test_a_fast_path_that_ignores_the_mask_is_found_out_before_it_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    expected = generated(model, (5, 6, 7), 1)
    monkeypatch.setattr(slot_cache, "attend_dense", blind)
    runner = opened(model)
    assert runner.path.name == "plain"
    assert "its logits on the ragged path are" in runner.path.why
    assert step(runner, whole(runner, 5, 6, 7)) == expected


def test_a_wrong_window_is_found_out_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    see = attention.Trial.see

    def see_no_window(self: Any, *args: Any) -> None:
        args[-1]["sliding_window"] = None
        see(self, *args)

    monkeypatch.setattr(attention.Trial, "see", see_no_window)
    assert opened(model_of("mistral")).path.name == "plain"
    assert opened(model_of("llama")).path.name == "ragged"


def test_a_model_that_was_refused_has_its_own_attention_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    before = model.config._attn_implementation
    monkeypatch.setattr(slot_cache, "attend_dense", blind)
    opened(model)
    assert model.config._attn_implementation == before


def test_release_gives_the_model_its_own_attention_back() -> None:
    model = model_of("llama")
    before = model.config._attn_implementation
    expected = generated(model, (5, 6, 7), 5)
    runner = opened(model)
    assert model.config._attn_implementation == attention.NAME
    runner.release()
    assert model.config._attn_implementation == before
    assert generated(model, (5, 6, 7), 5) == expected
    with pytest.raises(RuntimeError, match="not open"):
        _ = runner.path


# --- inputs


def test_inputs_are_placed_once_a_step_whatever_is_in_it() -> None:
    placing = Placing()
    runner = opened(model_of("llama"), placing)
    before = len(placing.calls)
    step(runner, whole(runner, 1, 2, 3), whole(runner, 9, 8))
    (call,) = placing.calls[before:]
    assert call["input_ids"].tolist() == [[1, 2, 3, 9, 8]]
    assert call["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert {(ids.dtype, ids.device.type) for ids in call.values()} == {(torch.int64, "cpu")}


@pytest.mark.parametrize("make", [mamba, t5])
def test_the_plain_path_places_what_a_model_of_its_kind_takes(make: Any) -> None:
    placing = Placing()
    runner = opened(make(), placing)
    before = len(placing.calls)
    step(runner, whole(runner, 1, 2, 3))
    names = [list(call) for call in placing.calls[before:]]
    assert names == ([["input_ids"]] if make is mamba else [["input_ids"], ["decoder_input_ids"]])


def returns(value: Any) -> Any:
    return lambda *, model, inputs: value


def raises(error: Exception) -> Any:
    def place_inputs(*, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Any:
        raise error

    return place_inputs


@pytest.mark.parametrize(
    ("place_inputs", "message"),
    [
        (returns(None), "place_inputs returned NoneType"),
        (returns([1]), "place_inputs returned list"),
        (returns({}), r"place_inputs returned \[\] for inputs \['input_ids'\]"),
        (returns({"ids": torch.zeros(1, 1)}), r"place_inputs returned \['ids'\]"),
        (returns({"input_ids": [[1]]}), "place_inputs returned <class 'list'> for input_ids"),
        (
            returns({"input_ids": torch.zeros(2, 1)}),
            r"place_inputs returned \(2, 1\) for input_ids",
        ),
        (raises(KeyError("device")), "place_inputs raised KeyError: 'device'"),
    ],
)
def test_a_strategy_that_breaks_its_contract_is_named(place_inputs: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        opened(model_of("llama"), place_inputs)


def test_an_error_that_a_strategy_raises_on_purpose_keeps_its_kind() -> None:
    with pytest.raises(PlacementMismatch):
        opened(model_of("llama"), raises(PlacementMismatch("inputs belong on cuda:0")))


# --- the trial


def test_trying_the_model_runs_a_prompt_and_a_token_and_leaves_nothing_behind() -> None:
    placing = Placing()
    runner = opened(model_of("llama"), placing)
    before = len(placing.calls)
    runner.try_out()
    assert len(placing.calls) == before + 2
    assert runner.path.memory.used_tokens == 0


def test_a_model_that_says_nan_is_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(LoadFailed, match=r"first token could not be generated.*1 NaN"):
        opened(model)


def test_a_model_that_raises_is_refused() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(LoadFailed, match="first token could not be generated: RuntimeError"):
        opened(model)


def test_a_model_that_breaks_while_it_serves_fails_the_trial() -> None:
    model = model_of("llama")
    runner = opened(model)
    runner.try_out()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LoadFailed, match="258 NaN"):
        runner.try_out()
    assert runner.path.memory.used_tokens == 0


@pytest.mark.parametrize("capacity", [1, 2, 3, 5])
def test_even_the_shortest_context_opens(capacity: int) -> None:
    for paged in (False, True):
        assert opened(model_of("llama"), max_context=capacity, paged=paged).path.name == "ragged"


# --- one thread


def test_a_second_thread_is_refused_even_after_the_first_has_ended() -> None:
    runner = Runner(model_of("llama"), stay, max_context=64)
    first = threading.Thread(target=runner.open, name="first")
    first.start()
    first.join()
    message = r"MainThread tried to run the model of thread first \(F6\)"
    for attempt in (
        lambda: runner.launch(Batch()),
        lambda: runner.open(),
    ):
        with pytest.raises(RuntimeError, match=message):
            attempt()


# --- sizes


def test_capacity_is_the_smaller_of_what_is_asked_and_what_the_model_can() -> None:
    assert Runner(model_of("llama"), stay, max_context=64).capacity == 64
    assert Runner(model_of("gpt2"), stay, max_context=100_000).capacity == MAX_CONTEXT
    assert Runner(model_of("gpt2"), stay, max_context=100_000).vocabulary == VOCAB


TOKEN_BYTES = KV_HEADS * 2 * HEAD_SIZE * 4
BUDGETS = (None, 100, 150, 400)


@pytest.mark.parametrize("kv_tokens", BUDGETS)
@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
@pytest.mark.parametrize(
    ("arch", "windows"),
    [
        ("llama", (None, None)),
        ("mistral", (SLIDING_WINDOW, SLIDING_WINDOW)),
        ("gemma2", (SLIDING_WINDOW, None)),
    ],
)
def test_what_is_reserved_is_what_the_plan_counts(
    arch: str, windows: tuple[int | None, ...], paged: bool, kv_tokens: int | None
) -> None:
    context, sequences, steps = 100, 3, 16
    runner = opened(
        model_of(arch),
        max_context=context,
        max_sequences=sequences,
        kv_tokens=kv_tokens,
        step_tokens=steps,
        paged=paged,
    )
    tokens = sum(
        kv.pool_tokens(
            kv_tokens or context * sequences,
            context,
            sequences,
            window,
            on_cuda=paged,
            step_tokens=steps,
        )
        for window in windows
    )
    assert runner.path.kv_bytes == {"cpu": tokens * TOKEN_BYTES}


def test_the_plain_path_reserves_nothing() -> None:
    assert opened(mamba()).path.kv_bytes == {}


def test_on_slots_no_more_run_at_once_than_the_budget_has_whole_contexts() -> None:
    runner = opened(model_of("llama"), max_context=64, max_sequences=8, kv_tokens=130)
    running: list[Sequence] = []
    while runner.path.memory.admit(one := sequence(4)):
        running.append(one)
    assert len(running) == 2
