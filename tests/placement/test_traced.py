"""The traced forward sees every operator, names the module, and leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import nn

from service.errors import PlacementMismatch
from service.placement import traced
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_model

INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4]])}


def test_it_returns_the_logits_of_an_ordinary_forward_and_counts_operators() -> None:
    model = tiny_model()
    logits, operators = traced.forward(model, INPUTS)
    assert logits.shape == (1, 4, VOCAB)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(**INPUTS).logits)
    # seven products in each of two layers, and the head
    assert operators > 15


@pytest.mark.parametrize("broken", [False, True])
def test_it_leaves_no_hook_behind(broken: bool) -> None:
    model = tiny_model()
    if broken:
        model.lm_head.to("meta")
        with pytest.raises(PlacementMismatch):
            traced.forward(model, INPUTS)
    else:
        traced.forward(model, INPUTS)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens",
        "model.layers.0.input_layernorm",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.gate_proj",
        "model.norm",
        "lm_head",
    ],
)
def test_the_module_that_computes_with_a_meta_tensor_is_named(name: str) -> None:
    model = tiny_model(tie=False)
    model.get_submodule(name).to("meta")
    with pytest.raises(PlacementMismatch, match=rf"^{name} computes \(\w+\) .* \(F1\)") as caught:
        traced.forward(model, INPUTS)
    assert (caught.value.failure_class, caught.value.tensors) == ("F1", (name,))


def test_a_tensor_outside_any_module_is_seen_in_the_one_that_uses_it() -> None:
    """What no scan of parameters and buffers finds."""
    model = tiny_model()
    mask = torch.zeros(64, device="meta")
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + mask)
    with pytest.raises(PlacementMismatch, match=r"computes \(add\) with a tensor on meta"):
        traced.forward(model, INPUTS)


def test_moving_and_making_tensors_on_meta_is_no_finding() -> None:
    """Offload hooks do it all the time."""
    model = tiny_model()

    def shuffle(module: Any, args: Any) -> None:
        module.weight.detach().to("meta")
        torch.empty_like(module.weight, device="meta")

    model.lm_head.register_forward_pre_hook(shuffle)
    assert traced.forward(model, INPUTS)[0].shape == (1, 4, VOCAB)


def test_a_module_whose_operator_raises_is_named() -> None:
    model = tiny_model()
    model.model.layers[1].self_attn.o_proj.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(PlacementMismatch) as caught:
        traced.forward(model, INPUTS)
    assert caught.value.message.startswith(
        "model.layers.1.self_attn.o_proj cannot run: RuntimeError: "
    )
    assert caught.value.tensors == ("model.layers.1.self_attn.o_proj",)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_no_operator_raised_passes_through() -> None:
    model = tiny_model()

    def refuse(module: Any, args: Any) -> None:
        raise KeyError("lm_head.weight")

    model.lm_head.register_forward_pre_hook(refuse)
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        traced.forward(model, INPUTS)


def test_a_mix_of_devices_is_refused() -> None:
    """As far as it can be shown without an accelerator: the rule, on tensors that say so."""

    class Elsewhere:
        device = torch.device("cuda:1")

        def dim(self) -> int:
            return 2

    watch = traced._Watch()
    watch.modules.append("model.layers.3.mlp")
    here: Any = torch.zeros(2, 2)
    there: Any = Elsewhere()
    with pytest.raises(PlacementMismatch, match=r"^model.layers.3.mlp mixes cpu and cuda:1") as e:
        watch._look("mm", [here, there])
    assert e.value.failure_class == "F17"
    watch._look("index", [here, there])  # indexing with CPU indices is torch's own rule
    watch._look("mul", [torch.tensor(2.0), there])  # and so is a CPU scalar
    watch._look("mm", [here, here])
