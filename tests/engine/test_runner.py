"""The model's owner: placement of inputs, caches, the one thread, what it refuses to run."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from transformers import MambaConfig
from transformers import MambaForCausalLM
from transformers import PreTrainedModel
from transformers import T5Config

from service.engine.runner import Runner
from service.errors import LoadFailed
from service.errors import PlacementMismatch
from service.errors import PluginError
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


def runner(place_inputs: Any = None, *, max_context: int = 64, arch: str = "llama") -> Runner:
    return Runner(tiny_model(arch), place_inputs or Placing(), max_context=max_context)


def test_a_step_returns_the_last_tokens_logits_as_float32() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    logits = Runner(model, Placing(), max_context=64).step(0, [1, 2, 3], 0)
    assert (logits.dtype, logits.device.type, tuple(logits.shape)) == (
        torch.float32,
        "cpu",
        (VOCAB,),
    )
    with torch.inference_mode():
        expected = model(torch.tensor([[1, 2, 3]])).logits[0, -1].float()
    torch.testing.assert_close(logits, expected)


def test_inputs_are_placed_once_a_step_and_never_anywhere_else() -> None:
    placing = Placing()
    one = runner(placing)
    one.step(0, [1, 2, 3], 0)
    one.step(0, [4], 3)
    one.step(1, [5], 0)
    one.free(0)
    assert [call["input_ids"].tolist() for call in placing.calls] == [[[1, 2, 3]], [[4]], [[5]]]
    for call in placing.calls:
        assert call.keys() == {"input_ids"}
        assert call["input_ids"].dtype == torch.int64
        assert call["input_ids"].device.type == "cpu"


def test_the_model_gets_what_the_strategy_returned() -> None:
    def shifted(*, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Any:
        return {name: tensor + 1 for name, tensor in inputs.items()}

    expected = runner().step(0, [2, 3], 0)
    torch.testing.assert_close(runner(shifted).step(0, [1, 2], 0), expected)


def test_caches_are_counted_and_freed() -> None:
    one = runner()
    one.step(0, [1, 2, 3], 0)
    one.step(1, [1], 0)
    assert one.kv_tokens == 4
    one.free(0)
    one.free(0)
    assert one.kv_tokens == 1
    one.step(0, [7], 0)  # a freed sequence begins anew
    assert one.kv_tokens == 2


def test_a_layer_with_a_sliding_window_keeps_no_more_than_the_window() -> None:
    model = tiny_model("mistral")
    caches = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    one = Runner(model, Placing(), max_context=64)
    one.step(0, range(30), 0)
    one.step(0, [1], 30)
    assert [layer.keys.shape[-2] for layer in caches[0].layers] == [SLIDING_WINDOW - 1] * 2


def test_a_step_out_of_order_is_refused() -> None:
    one = runner()
    one.step(0, [1, 2, 3], 0)
    with pytest.raises(RuntimeError, match="step at 2, but its cache has 3 tokens"):
        one.step(0, [1], 2)


def test_a_second_thread_is_refused_even_after_the_first_has_ended() -> None:
    one = runner()
    first = threading.Thread(target=lambda: one.step(0, [1], 0), name="first")
    first.start()
    first.join()
    with pytest.raises(RuntimeError, match=r"MainThread tried to run the model of thread first"):
        one.step(0, [2], 1)
    with pytest.raises(RuntimeError, match="F6"):
        one.free(0)


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
        runner(place_inputs).warm_up()


def test_an_error_that_a_strategy_raises_on_purpose_keeps_its_kind() -> None:
    with pytest.raises(PlacementMismatch):
        runner(raises(PlacementMismatch("inputs belong on cuda:0"))).warm_up()


def test_warm_up_runs_a_prompt_and_a_token_and_leaves_nothing_behind() -> None:
    placing = Placing()
    one = runner(placing)
    one.warm_up()
    assert len(placing.calls) == 2
    assert one.kv_tokens == 0


def test_warm_up_refuses_a_model_that_says_nan() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(LoadFailed, match=r"first token could not be generated.*1 NaN"):
        Runner(model, Placing(), max_context=64).warm_up()


def test_warm_up_refuses_a_model_that_raises() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(LoadFailed, match="first token could not be generated: RuntimeError"):
        Runner(model, Placing(), max_context=64).warm_up()


def test_capacity_is_the_smaller_of_what_is_asked_and_what_the_model_can() -> None:
    assert runner(max_context=64).capacity == 64
    assert runner(max_context=100_000, arch="gpt2").capacity == MAX_CONTEXT
    assert runner().vocabulary == VOCAB


def test_models_of_other_kinds_are_refused_by_name() -> None:
    t5 = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(LoadFailed, match="T5ForConditionalGeneration is an encoder-decoder"):
        Runner(t5, Placing(), max_context=64)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(LoadFailed, match="MambaForCausalLM is a model with recurrent state"):
        Runner(mamba, Placing(), max_context=64)
    encoder = tiny_model().model  # without its head it is no language model
    with pytest.raises(LoadFailed, match="LlamaModel is not a language model"):
        Runner(encoder, Placing(), max_context=64)
