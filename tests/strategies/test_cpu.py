"""Strategy cpu: packed layers and formats of its own, planned to the byte and proven."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from service.engine.runner import Runner
from service.errors import ConfigError
from service.errors import DoesNotFit
from service.errors import PlacementMismatch
from service.errors import PlacementUnavailable
from service.placement import cpu_linears
from service.placement import cpu_planning
from service.placement import overhead
from service.placement import registry
from service.placement.certificate import Certificate
from service.placement.certificate import certify
from service.placement.hardware import Hardware
from service.placement.loading import Loaded
from service.placement.plan import Placement
from service.placement.registry import Strategy
from service.placement.watch import Watch
from tests.support.planned import GIB
from tests.support.planned import bring_up
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.tiny import save_tiny

IDS = {"input_ids": torch.tensor([[72, 101, 108, 108, 111]])}
# large enough to be packed: 256 x 256, but for keys and values
WIDE = {"hidden_size": 256, "head_dim": 64, "vocab_size": 512}
# of two layers: q, o, gate, up, down; the head is the eleventh; keys and values are 128 x 256
PACKED = 2 * 5 + 1


def strategy(name: str = "cpu") -> Strategy:
    return registry.build().select(name)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "wide"
    keys = {**WIDE, "intermediate_size": 512}
    return save_tiny(made, "llama", tie=request.param, dtype=torch.bfloat16, **keys)


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values are large enough to be packed too: 256 x 256."""
    made = tmp_path_factory.mktemp("models") / "wider"
    keys = {**WIDE, "intermediate_size": 512, "num_key_value_heads": 4}
    return save_tiny(made, "llama", dtype=torch.bfloat16, **keys)


def planned(folder: Path, hardware: Hardware | None = None, **changes: Any) -> Placement:
    chosen = strategy()
    config = registry.settle(model_config(folder, strategy="cpu", **changes), chosen, {})
    return chosen.plan(config, hardware or ram(GIB))


def served(folder: Path, **changes: Any) -> tuple[Loaded, Certificate]:
    """The model brought up, and its certificate, which is valid."""
    chosen = strategy()
    config = registry.settle(model_config(folder, strategy="cpu", **changes), chosen, {})
    loaded = bring_up(chosen, config, ram(GIB))
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    return loaded, certificate


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = loaded.model(**IDS).logits.float()
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linears_are_packed_and_the_copies_are_in_the_plan_to_the_byte(folder: Path, dtype: str):
    loaded, certificate = served(folder, dtype=dtype)
    plain, _ = served(folder, dtype=dtype, options={"pack": "off"})
    packed = [m for m in loaded.model.modules() if isinstance(m, cpu_linears.PackedLinear)]
    assert len(packed) == loaded.placement.packed == PACKED
    assert certificate.devices["cpu"] == loaded.placement.memory["cpu"].weights
    assert certificate.plan_errors == {"cpu": 0}
    copies = sum(m.weight.numel() * m.weight.element_size() for m in packed)
    assert copies == certificate.devices["cpu"] - plain.placement.memory["cpu"].weights
    assert any("packed copies" in note for note in loaded.placement.notes)
    near = {"rtol": 0.05, "atol": 0.15} if dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(loaded), logits(plain), **near)


def test_the_parameters_of_a_packed_model_are_those_of_the_plain_one(folder: Path):
    loaded, _ = served(folder)
    plain, _ = served(folder, options={"pack": "off"})
    assert plain.placement.packed == 0
    assert loaded.model.state_dict().keys() == plain.model.state_dict().keys()
    values = plain.model.state_dict()
    assert all(torch.equal(t, values[name]) for name, t in loaded.model.state_dict().items())


def test_without_room_for_the_copies_there_are_none_and_the_plan_says_so(folder: Path):
    whole, plain = planned(folder), planned(folder, options={"pack": "off"})
    room = (whole.memory["cpu"].total + plain.memory["cpu"].total) // 2
    made = planned(folder, max_memory={"cpu": room})
    assert (made.packed, made.memory) == (0, plain.memory)
    assert "No packed copies of the linear layers: they do not fit. It runs slower." in made.notes


def test_a_model_too_small_to_pack_is_left_as_it_is(tmp_path: Path):
    loaded, _ = served(save_tiny(tmp_path / "m", "llama"))
    assert loaded.placement.packed == 0
    assert {type(m) for m in loaded.model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_pack_is_auto_or_off():
    with pytest.raises(ConfigError, match=r"options\.pack"):
        registry.settle(model_config(Path("m"), options={"pack": "always"}), strategy(), {})


def test_release_takes_the_copies_away(folder: Path):
    loaded, _ = served(folder)
    loaded.strategy.release(loaded.model)
    assert not any(isinstance(m, cpu_linears.PackedLinear) for m in loaded.model.modules())
    with pytest.raises(PlacementMismatch, match=f"0 linear layers .* {PACKED} were planned"):
        loaded.strategy.validate(loaded.model, loaded.placement)


@pytest.mark.parametrize("name", ["k_proj", "o_proj"])
def test_a_copy_that_is_not_its_weight_is_refused(wider: Path, name: str):
    loaded, _ = served(wider)
    layer = loaded.model.get_submodule(f"model.layers.1.self_attn.{name}")
    assert (getattr(layer, "shared", None) is not None) == (name == "k_proj")
    with torch.no_grad():
        layer.weight[-8:] *= 3
    with pytest.raises(PlacementMismatch, match=rf"copy of model.layers.1.self_attn.{name} does"):
        loaded.strategy.validate(loaded.model, loaded.placement)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_layers_that_read_one_tensor_are_computed_together_and_served_on_the_fast_path(
    wider: Path, quantize: str
):
    loaded, certificate = served(wider, quantize=quantize)
    assert certificate.plan_errors == {"cpu": 0}
    layers = {name: getattr(m, "shared", None) for name, m in loaded.model.named_modules()}
    groups = [one for one in layers.values() if one is not None]
    assert len(groups) == 2 * 5  # q, k, v, gate, up
    assert len({id(one) for one in groups}) == 2 * 2
    runner = Runner(loaded.model, loaded.strategy.place_inputs, max_context=64, max_sequences=2)
    runner.open()
    try:
        assert (runner.path.name, runner.path.why) == ("ragged", "")
        assert all(one.empty for one in groups)
    finally:
        runner.release()


@pytest.mark.parametrize(("quantize", "least"), [("int8", 0.97), ("int4", 0.8)])
def test_a_quantised_model_weighs_what_was_planned_and_says_nearly_the_same(
    folder: Path, quantize: str, least: float
):
    loaded, certificate = served(folder, quantize=quantize)
    plain, _ = served(folder, options={"pack": "off"})
    assert certificate.quantized_linears == loaded.placement.quantized == 2 * 7 + 1
    assert certificate.plan_errors == {"cpu": 0}
    assert not any(t.device.type == "meta" for t in loaded.model.parameters())
    near, exact = logits(loaded).flatten(), logits(plain).flatten()
    assert not torch.equal(near, exact)
    assert torch.nn.functional.cosine_similarity(near, exact, dim=0) > least
    kinds = [type(m).__name__ for m in loaded.model.modules()]
    head = type(loaded.model.get_output_embeddings()).__name__
    assert head == "Int8Linear"
    assert kinds.count("Int4Linear") == (14 if quantize == "int4" else 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_an_embedding_is_not_changed_by_its_quantised_head(folder: Path, quantize: str, dtype: str):
    loaded, _ = served(folder, quantize=quantize, dtype=dtype)
    plain, _ = served(folder, dtype=dtype, options={"pack": "off"})
    mine, theirs = loaded.model.get_input_embeddings(), plain.model.get_input_embeddings()
    assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize("changes", [{}, {"quantize": "int8"}, {"quantize": "int4"}])
def test_the_watch_raises_no_alarm_and_sees_a_replaced_weight(
    folder: Path, changes: dict[str, str]
):
    loaded, _ = served(folder, **changes)
    logits(loaded)
    one = Watch(loaded.model, 30.0)
    logits(loaded)
    assert one.look(thorough=True) is None
    layer = loaded.model.get_submodule("model.layers.1.mlp.down_proj")
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    assert one.look(thorough=True) is not None
    assert {change.name for change in one.changes} == {"model.layers.1.mlp.down_proj.weight"}


def test_a_quantised_layer_without_its_scale_is_refused(folder: Path):
    loaded, _ = served(folder, quantize="int8")
    loaded.model.get_submodule("model.layers.0.mlp.up_proj").scale = None
    failure = certify(loaded).failure()
    assert failure is not None
    assert failure.failure_class == "F14"


def test_a_layer_left_as_it_was_is_refused(folder: Path):
    loaded, _ = served(folder, quantize="int4")
    mlp = loaded.model.get_submodule("model.layers.0.mlp")
    mlp.up_proj = nn.Linear(256, 512, bias=False, dtype=torch.bfloat16)
    failure = certify(loaded).failure()
    assert failure is not None
    assert "asked for int4: 14 of 15 linears are quantised (F13)" in failure.message


def test_the_load_must_fit_before_it_is_quantised(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overhead, "CPU_KERNELS", 0)  # more than all of this small model
    small = planned(folder, quantize="int4").memory["cpu"].total
    before = planned(folder, options={"pack": "off"}).memory["cpu"].weights
    note = next(n for n in planned(folder, quantize="int4").notes if "The load takes" in n)
    assert note.endswith("before the weights are int4.")
    asked = {"quantize": "int4", "max_context": 1, "max_sequences": 1}
    room = before - 1
    assert planned(folder, **asked).memory["cpu"].total < room > small / 2
    with pytest.raises(DoesNotFit, match="is quantised after it was loaded"):
        planned(folder, **asked, max_memory={"cpu": room})


@pytest.mark.parametrize("name", ["auto-shard", "single-gpu"])
def test_int4_is_refused_by_name_where_there_is_no_kernel(folder: Path, name: str):
    config = model_config(folder, strategy=name, quantize="int4")
    with pytest.raises(PlacementUnavailable, match=f"{name} cannot do quantize: int4"):
        strategy(name).plan(registry.settle(config, strategy(name), {}), cards(GIB))


def test_four_bits_of_bitsandbytes_are_still_theirs(folder: Path):
    made = planned(folder, quantize="nf4")
    assert made.packed == 0
    assert "quantization_config" in made.load_kwargs
    cpu_planning.packed_as_planned(nn.Identity(), made)
