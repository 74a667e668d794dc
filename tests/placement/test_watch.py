"""The watch sees every change of a model that serves, and none that is ordinary."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook
from accelerate.hooks import add_hook_to_module
from accelerate.hooks import remove_hook_from_module
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.placement import watch
from service.placement.loading import Loaded
from service.placement.watch import Watch
from tests.support.gates import PATIENCE_S
from tests.support.placing import bring_up
from tests.support.placing import logits
from tests.support.placing import offloaded
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_model

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", tie=False)


def watched(model: nn.Module) -> Watch:
    return Watch(model, 30.0)


def found(one: Watch) -> dict[str, tuple[str, str, str]]:
    """Name -> class, was, now of the first look that finds something."""
    error = one.look(thorough=False)
    assert error is not None
    assert {change.name for change in one.changes} >= set(error.tensors)
    return {c.name: (c.failure_class, c.was, c.now) for c in one.changes}


# --- what it sees


def test_a_healthy_model_has_no_findings_and_the_looks_are_counted(model: PreTrainedModel) -> None:
    one = watched(model)
    for _ in range(3):
        assert one.look(thorough=False) is None
        logits(model)
    assert one.look(thorough=True) is None
    told = one.as_dict()
    assert told["enabled"] is True
    assert told["interval_s"] == 30.0
    assert (told["checks"], told["changed"], told["findings"]) == (4, 0, [])
    assert told["checked_at"] == told["unchanged_until"]
    assert told["ms"] > 0


def test_half_retypes_every_weight(model: PreTrainedModel) -> None:
    one = watched(model)
    model.half()
    changes = found(one)
    assert changes[f"{DOWN}.weight"] == ("F18", "float32", "float16")
    assert changes.keys() >= {name for name, _ in model.named_parameters()}


def test_to_another_number_format_of_one_module(model: PreTrainedModel) -> None:
    one = watched(model)
    model.get_submodule(DOWN).to(torch.bfloat16)
    assert found(one) == {f"{DOWN}.weight": ("F18", "float32", "bfloat16")}


def test_to_another_device(model: PreTrainedModel) -> None:
    one = watched(model)
    model.lm_head.to("meta")
    assert found(one) == {"lm_head.weight": ("F18", "on cpu", "on meta")}


def test_a_buffer_on_another_device(model: PreTrainedModel) -> None:
    one = watched(model)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to("meta")
    assert found(one) == {"model.rotary_emb.inv_freq": ("F18", "on cpu", "on meta")}


def test_a_parameter_replaced_by_its_equal(model: PreTrainedModel) -> None:
    one = watched(model)
    layer = model.get_submodule(DOWN)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert found(one) == {
        f"{DOWN}.weight": ("F18", "the tensor that was proven", "another in its place")
    }


def test_a_parameter_of_another_shape(model: PreTrainedModel) -> None:
    one = watched(model)
    model.resize_token_embeddings(300, mean_resizing=False)
    assert found(one)["lm_head.weight"] == ("F18", "of shape (258, 64)", "of shape (300, 64)")


def test_a_module_exchanged_for_one_with_other_names(model: PreTrainedModel) -> None:
    one = watched(model)
    model.lm_head = nn.Sequential(model.lm_head)
    assert found(one) == {
        "lm_head.weight": ("F18", "float32 on cpu", "gone"),
        "lm_head.0.weight": ("F18", "not there", "float32 on cpu"),
    }


def test_untying(tmp_path: Path) -> None:
    model = tiny_model("llama", tie=True)
    one = watched(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert found(one).keys() == {"lm_head.weight"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_became_nan_or_infinite(model: PreTrainedModel, value: float) -> None:
    one = watched(model)
    with torch.no_grad():
        model.get_submodule(DOWN).weight.fill_(value)
    changes = found(one)
    assert changes == {f"{DOWN}.weight": ("F16", "finite numbers", "NaN or infinite")}
    error = one.error()
    assert error is not None
    assert error.failure_class == "F16"


def test_every_tensor_has_its_turn_to_be_read() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(100)))
    looks = -(-200 // watch.TENSORS_A_LOOK)
    for last in (0, 99):
        one = watched(model)
        with torch.no_grad():
            model[last].bias.fill_(float("nan"))
        assert any(one.look(thorough=False) for _ in range(looks))
        with torch.no_grad():
            model[last].bias.zero_()


def test_a_thorough_look_reads_all_tensors_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(100)))
    one = watched(model)
    with torch.no_grad():
        model[99].bias.fill_(float("nan"))
    assert one.look(thorough=False) is None
    assert one.look(thorough=True) is not None


def test_every_row_has_its_turn_to_be_read() -> None:
    model = nn.Linear(8, 40)
    one = watched(model)
    with torch.no_grad():
        model.weight[17, 3] = float("nan")
    assert any(one.look(thorough=False) for _ in range(40))


def test_hooks_that_were_removed(folder: Path) -> None:
    model = offloaded(folder).model
    one = watched(model)
    hooked = {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    remove_hook_from_submodules(model)
    changes = found(one)
    assert {name or "the model" for name in hooked} == changes.keys()
    assert changes["model.layers.3.mlp.down_proj"] == (
        "F17",
        "under AlignDevicesHook for cpu, offloading",
        "without its hook",
    )


def test_a_hook_for_another_device(folder: Path) -> None:
    model = offloaded(folder).model
    name = "model.layers.3.mlp.down_proj"
    one = watched(model)
    model.get_submodule(name)._hf_hook.execution_device = 1
    was, now = (f"under AlignDevicesHook for {device}, offloading" for device in ("cpu", "cuda:1"))
    assert found(one) == {name: ("F17", was, now)}


def test_a_hook_exchanged_for_its_like(model: PreTrainedModel) -> None:
    module = model.get_submodule(DOWN)
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    one = watched(model)
    remove_hook_from_module(module)
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert found(one)[DOWN][2] == "under AlignDevicesHook for cpu, which is another one"


def test_nan_in_weights_that_rest_in_ram_while_offloaded(model: PreTrainedModel) -> None:
    from accelerate import cpu_offload

    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=kept)
    logits(model)
    one = watched(model)
    assert one.look(thorough=True) is None
    kept[f"{DOWN}.weight"].fill_(float("nan"))
    assert found(one) == {f"{DOWN}.weight": ("F16", "finite numbers", "NaN or infinite")}


def test_the_error_says_what_changed_and_since_when(model: PreTrainedModel) -> None:
    one = watched(model)
    model.lm_head.half()
    error = one.look(thorough=False)
    assert error is not None
    assert (error.status, error.code, error.failure_class) == (503, "placement_drifted", "F18")
    assert "(F18): lm_head.weight was float32, is float16" in error.message
    told = one.as_dict()
    assert f"as it should be at {told['unchanged_until']}" in error.message
    assert f"found at {told['checked_at']}" in error.message
    assert error.tensors == ("lm_head.weight",)
    assert error.retry_after_s
    assert told["findings"] == [
        {"class": "F18", "name": "lm_head.weight", "was": "float32", "now": "float16"}
    ]


def test_what_was_found_stays_found(model: PreTrainedModel) -> None:
    one = watched(model)
    model.lm_head.half()
    assert one.look(thorough=False) is not None
    model.lm_head.float()
    assert one.look(thorough=False) is not None
    assert one.checks == 1


def test_many_findings_are_counted_and_the_first_are_named(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MOST_FINDINGS", 3)
    one = watched(model)
    model.half()
    error = one.look(thorough=False)
    assert error is not None
    assert len(error.tensors) == 3
    told = one.as_dict()
    assert len(told["findings"]) == 3
    assert told["changed"] == len(one.changes) > 20


# --- what is ordinary


def test_it_keeps_no_model_and_no_hook_alive(folder: Path) -> None:
    loaded = offloaded(folder)
    one = watched(loaded.model)
    model = weakref.ref(loaded.model)
    hook = weakref.ref(loaded.model.model.layers[3].mlp.down_proj._hf_hook)
    del loaded
    gc.collect()
    assert model() is None
    assert hook() is None
    assert one.look(thorough=True) is None


def test_a_step_that_raised_half_way_through_an_offloaded_layer_is_no_change(folder: Path) -> None:
    model = offloaded(folder).model
    logits(model)
    one = watched(model)
    target = model.model.layers[3].mlp.down_proj
    whole = target._old_forward

    def broken(*args: object) -> torch.Tensor:
        raise MemoryError("no room")

    target._old_forward = broken
    with pytest.raises(MemoryError):
        logits(model)
    assert not target.weight.is_meta  # its hook brought it and did not get to take it away
    assert one.look(thorough=True) is None
    target._old_forward = whole
    logits(model)
    assert one.look(thorough=True) is None


def test_half_of_an_offloaded_model_is_seen_although_its_weights_are_on_meta(folder: Path) -> None:
    model = offloaded(folder).model
    one = watched(model)
    model.half()
    assert found(one)["model.layers.3.mlp.down_proj.weight"] == ("F18", "float32", "float16")


def test_a_buffer_made_anew_by_a_forward_is_no_change() -> None:
    """Dynamic RoPE computes its frequencies again when a sequence exceeds the trained length."""
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=parameters, max_position_embeddings=8)
    logits(model)
    one = watched(model)
    address = model.model.rotary_emb.inv_freq.data_ptr()
    logits(model, torch.arange(32)[None])
    assert model.model.rotary_emb.inv_freq.data_ptr() != address
    assert one.look(thorough=True) is None


def test_a_buffer_that_a_forward_added_is_no_change_but_a_parameter_is(
    model: PreTrainedModel,
) -> None:
    one = watched(model)
    model.register_buffer("cache", torch.zeros(3))
    assert one.look(thorough=True) is None
    model.register_parameter("adapter", nn.Parameter(torch.zeros(3)))
    assert found(one) == {"adapter": ("F18", "not there", "float32 on cpu")}


def test_what_a_hook_of_another_kind_may_move_is_compared_by_format(
    model: PreTrainedModel,
) -> None:
    _, hook = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    one = watched(model)
    layer = model.get_submodule(DOWN)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert one.look(thorough=True) is None
    layer.half()
    assert found(one) == {f"{DOWN}.weight": ("F18", "float32", "float16")}
    assert hook is not None


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_quantised_layer_may_take_its_final_shape_late(folder: Path, quantize: str) -> None:
    """An expert that no token was sent to until now; here: no forward at all."""
    loaded = bring_up(folder, quantize=quantize)
    one = watched(loaded.model)
    for _ in range(3):
        logits(loaded.model)
        assert one.look(thorough=True) is None, one.changes


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_weight_that_is_replaced_is_a_change(folder: Path, quantize: str) -> None:
    loaded = bring_up(folder, quantize=quantize)
    logits(loaded.model)
    one = watched(loaded.model)
    weight = loaded.model.get_submodule(DOWN).weight
    weight.data = weight.data.clone()
    assert found(one).keys() == {f"{DOWN}.weight"}


# --- beside the engine


Serve = Callable[[Loaded], tuple[Engine, Watch]]


@pytest.fixture
def serve() -> Serve:
    engines: list[Engine] = []

    def serve(loaded: Loaded) -> tuple[Engine, Watch]:
        runner = Runner(loaded.model, loaded.strategy.place_inputs, max_context=64, max_sequences=4)
        engine = Engine(runner, max_queue=16)
        engines.append(engine)
        engine.start()
        one = watched(loaded.model)
        engine.look_with(one.look)
        return engine, one

    yield serve  # type: ignore[misc]
    for engine in engines:
        engine.close()


def generate(engine: Engine, tokens: int) -> list[int]:
    stream = engine.submit([7, 1, 250], SamplingParams(max_tokens=tokens, temperature=0.0))
    said: list[int] = []
    while more := stream.read(PATIENCE_S):
        said += more
    return said


def test_no_alarm_while_an_offloaded_model_generates_and_four_threads_ask_for_looks(
    folder: Path, serve: Serve
) -> None:
    engine, one = serve(offloaded(folder))
    done = threading.Event()

    def hammer() -> None:
        while not done.is_set():
            engine.inspect(0.5)

    askers = [threading.Thread(target=hammer) for _ in range(4)]
    for asker in askers:
        asker.start()
    answers: list[list[int]] = []
    while len(answers) < 4 or one.checks < 100:  # they may be slow to ask, and the engine fast
        answers.append(generate(engine, 40))
    done.set()
    for asker in askers:
        asker.join(PATIENCE_S)
    assert one.changes == ()
    assert engine.alive
    assert engine.stats().steps >= 160
    assert {len(answer) for answer in answers} == {40}
    assert all(answer == answers[0] for answer in answers)


def test_the_engine_sees_the_change_and_ends(folder: Path, serve: Serve) -> None:
    loaded = offloaded(folder)
    engine, one = serve(loaded)
    assert engine.inspect(PATIENCE_S)
    assert one.checks == 1
    remove_hook_from_submodules(loaded.model)
    assert engine.inspect(PATIENCE_S)
    assert one.changes[0].failure_class == "F17"


# --- when it looks


class Asked:
    """Stands in for `Engine.inspect`."""

    def __init__(self, one: Watch, enough: int = 3) -> None:
        self.waits: list[float] = []
        self.enough = threading.Event()
        self._one, self._many = one, enough

    def __call__(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)
        if len(self.waits) == self._many:
            self.enough.set()


def test_the_timer_asks_again_and_again_until_it_is_closed(model: PreTrainedModel) -> None:
    others = set(threading.enumerate())
    one = Watch(model, 0.001)
    asked = Asked(one)
    one.patrol(asked)
    assert asked.enough.wait(PATIENCE_S)
    one.close()
    for thread in set(threading.enumerate()) - others:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert set(asked.waits) == {0.0}


def test_a_probe_asks_at_most_once_a_second_and_waits_shortly(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Watch(model, 1000.0)
    asked = Asked(one)
    one.patrol(asked)
    now = [500.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    for seconds in (0.0, 0.3, 0.9, 1.0, 1.9, 2.0):
        now[0] = 500.0 + seconds
        one.probe()
    one.close()
    assert asked.waits == [watch.PROBE_WAIT_S] * 3
