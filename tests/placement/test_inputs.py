"""Where inputs belong, in the order it is asked, and what `place` lets through."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.hooks import SequentialHook
from accelerate.hooks import add_hook_to_module

from service.errors import PlacementMismatch
from service.errors import PluginError
from service.placement.inputs import input_device
from service.placement.inputs import place
from service.placement.inputs import to_input_device
from tests.support.tiny import tiny_model

IDS = torch.tensor([[1, 2, 3]])


def hooked(module: torch.nn.Module, device: Any) -> None:
    """An accelerate hook, without the move that attaching one makes."""
    module._hf_hook = AlignDevicesHook(execution_device=device)


def test_a_whole_model_takes_inputs_where_its_embedding_is() -> None:
    assert input_device(tiny_model()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("said", "device"),
    [(0, "cuda:0"), (3, "cuda:3"), ("cuda:1", "cuda:1"), (torch.device("cpu"), "cpu")],
)
def test_the_embeddings_own_hook_is_asked_first(said: Any, device: str) -> None:
    model = tiny_model()
    hooked(model, "cuda:7")
    hooked(model.get_input_embeddings(), said)
    assert input_device(model, "cuda:5") == torch.device(device)


def test_then_the_embeddings_weight_unless_it_is_on_meta() -> None:
    model = tiny_model()
    hooked(model, "cuda:7")
    assert input_device(model, "cuda:5") == torch.device("cpu")
    model.get_input_embeddings().to("meta")
    assert input_device(model, "cuda:5") == torch.device("cuda:7")


def test_then_the_plan_and_then_it_is_refused() -> None:
    model = tiny_model()
    model.get_input_embeddings().to("meta")
    assert input_device(model, "cuda:5") == torch.device("cuda:5")
    with pytest.raises(PlacementMismatch, match=r"nothing says where inputs belong: .* \(F7\)"):
        input_device(model)


def test_a_hook_in_a_sequence_of_hooks_is_found() -> None:
    model = tiny_model()
    model.get_input_embeddings()._hf_hook = SequentialHook(AlignDevicesHook(execution_device=2))
    assert input_device(model) == torch.device("cuda:2")


def test_a_hook_without_a_device_is_passed_over() -> None:
    model = tiny_model()
    add_hook_to_module(model.get_input_embeddings(), AlignDevicesHook())
    assert input_device(model) == torch.device("cpu")


def test_inputs_come_back_in_a_new_dict_with_the_same_values() -> None:
    inputs = {"input_ids": IDS, "position_ids": IDS + 4}
    placed = to_input_device(tiny_model(), inputs)
    assert placed is not inputs
    assert placed.keys() == inputs.keys()
    for name, tensor in inputs.items():
        assert torch.equal(placed[name], tensor)
        assert placed[name].dtype == torch.int64


def returning(value: Any) -> Any:
    return lambda *, model, inputs: value


def test_place_hands_on_what_the_hook_returned() -> None:
    seen: list[Any] = []
    result = {"input_ids": IDS.clone()}

    def hook(*, model: Any, inputs: Any) -> Any:
        seen.append((model, inputs))
        return result

    model: Any = SimpleNamespace()
    inputs = {"input_ids": IDS}
    assert place(hook, model, inputs) is result
    assert seen == [(model, inputs)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "returned NoneType for inputs"),
        ([IDS], "returned list for inputs"),
        ({}, r"returned \[\] for inputs \['input_ids'\]"),
        ({"input_ids": IDS, "more": IDS}, r"returned \['input_ids', 'more'\]"),
        ({1: IDS, "input_ids": IDS}, r"returned \['1', 'input_ids'\]"),
        ({"input_ids": [1, 2, 3]}, "returned <class 'list'> for input_ids"),
        ({"input_ids": IDS[0]}, r"returned \(3,\) for input_ids of \(1, 3\)"),
        ({"input_ids": IDS.float()}, "returned torch.float32 for input_ids of torch.int64"),
    ],
)
def test_place_refuses_what_breaks_the_contract(value: Any, words: str) -> None:
    model: Any = SimpleNamespace()
    with pytest.raises(PluginError, match=f"The strategy's place_inputs {words}"):
        place(returning(value), model, {"input_ids": IDS})
    with pytest.raises(PluginError, match=f"strategy mine: place_inputs {words}"):
        place(returning(value), model, {"input_ids": IDS}, "strategy mine: place_inputs")


def test_place_names_what_the_hook_raised_and_keeps_an_error_on_purpose() -> None:
    def raising(*, model: Any, inputs: Any) -> Any:
        raise error

    model: Any = SimpleNamespace()
    error: Exception = KeyError("cuda:9")
    with pytest.raises(PluginError, match="place_inputs raised KeyError: 'cuda:9'") as caught:
        place(raising, model, {"input_ids": IDS})
    assert caught.value.__cause__ is error
    error = PlacementMismatch("the card is gone")
    with pytest.raises(PlacementMismatch, match="the card is gone"):
        place(raising, model, {"input_ids": IDS})


def test_place_judges_by_what_it_handed_over_even_if_the_hook_empties_it() -> None:
    def hook(*, model: Any, inputs: Any) -> Any:
        inputs.clear()
        return {}

    model: Any = SimpleNamespace()
    with pytest.raises(PluginError, match=r"returned \[\] for inputs \['input_ids'\]"):
        place(hook, model, {"input_ids": IDS})
