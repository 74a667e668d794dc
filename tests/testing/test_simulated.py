"""Plans run on accelerators that are not here: what holds is proven, what does not is named."""

import json
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from service.cli.main import app
from service.placement import registry
from service.placement.hardware import GIB
from service.placement.hardware import Hardware
from service.testing import pretended
from service.testing.machines import cards
from service.testing.simulation import Job
from service.testing.simulation import Simulation
from service.testing.simulation import kv_lines
from service.testing.simulation import sentences
from service.testing.simulation import simulate_all
from tests.support.placing import config_of
from tests.support.planned import STRATEGY
from tests.support.planned import write_shape
from tests.support.planned import write_strategy
from tests.support.tiny import tiny_config

# the others start their process as the command does
FORKED = pytest.mark.usefixtures("forked_simulations")
TWO = cards(24 * GIB, 24 * GIB)
TINY_MIXTRAL = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2", "gemma3_text", "mixtral")
# of a card that no other plan has
LAST = 7


def job(
    folder: Path,
    arch: str = "llama",
    strategy: str = "auto-shard",
    machine: Hardware = TWO,
    *,
    shape: Mapping[str, Any] | None = None,
    tie: bool | None = None,
    **keys: Any,
) -> Job:
    """A plan for a model of which there is a configuration only."""
    if shape is None and arch != "mixtral":
        tiny_config(arch, layers=4, tie=tie).save_pretrained(folder)
    else:
        write_shape(folder, arch, **(TINY_MIXTRAL if shape is None else shape))
    found = registry.build([folder.parent / "strategies"] if strategy == "mine" else [])
    chosen = found.select(strategy)
    config = registry.settle(config_of(folder, strategy, **keys), chosen, {})
    return Job(config, chosen, chosen.plan(config, machine))


def mapped(made: Job, changes: Mapping[str, Any], without: tuple[str, ...] = ()) -> Job:
    """The same plan with another map."""
    kept = made.placement.load_kwargs["device_map"]
    device_map = {name: device for name, device in kept.items() if name not in without} | changes
    kwargs = {**made.placement.load_kwargs, "device_map": device_map}
    return replace(made, placement=replace(made.placement, load_kwargs=kwargs))


def mine(folder: Path, place_inputs: str) -> Job:
    """auto-shard with another `place_inputs`."""
    head = STRATEGY[: STRATEGY.index("@hookimpl\ndef place_inputs")]
    plan = """
@hookimpl
def plan(config, hardware):
    from service.placement import planning

    return planning.spread(config, hardware)


"""
    write_strategy(folder / "strategies" / "mine.py", plan + place_inputs, head)
    return job(folder / "m", strategy="mine")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, Simulation]]:
    """Every plan that must hold, in one process."""
    folder = tmp_path_factory.mktemp("healthy")
    small = cards(12 * GIB, 12 * GIB)
    jobs = {arch: job(folder / arch, arch) for arch in ARCHITECTURES}
    jobs["tied"] = job(folder / "tied", tie=True)
    seven = {"dtype": "bfloat16"}  # transformers' default Llama is the 7B one
    jobs["7b"] = job(folder / "7b", "llama", machine=small, shape=seven)
    narrow = cards(5 * GIB, 5 * GIB)
    away = {"machine": narrow, "shape": seven, "on_no_fit": "offload-cpu"}
    jobs["offloaded"] = job(folder / "offloaded", "llama", **away)
    on_disk = {**away, "on_no_fit": "offload-disk", "max_memory": {"cpu": 2 * GIB}}
    jobs["on-disk"] = job(folder / "on-disk", "llama", **on_disk)
    jobs["single-gpu"] = job(folder / "single", strategy="single-gpu")
    eighth = {"machine": cards(*[24 * GIB] * 8), "options": {"device": LAST}}
    jobs["last-gpu"] = job(folder / "last", strategy="single-gpu", **eighth)
    jobs["nf4"] = job(folder / "nf4", strategy="four-bit")
    jobs["cpu"] = job(folder / "cpu", strategy="cpu")
    return dict(zip(jobs, zip(jobs.values(), simulate_all([*jobs.values()]), strict=True),
                    strict=True))  # fmt: skip


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "tied", "7b"])
def test_a_map_over_two_cards_is_proven_with_the_kv_of_every_layer(
    healthy: dict[str, tuple[Job, Simulation]], arch: str
):
    made, found = healthy[arch]
    assert (found.status, found.message, found.error) == ("proven", "", None)
    assert found.devices == ("cuda:0", "cuda:1")
    assert found.operators > 100
    assert found.kv == {u.name: made.placement.module_map[u.name] for u in made.placement.units
                        if u.kv}  # fmt: skip
    assert set(found.kv.values()) == {"cuda:0", "cuda:1"}


def test_seven_billion_parameters_without_weights_are_balanced_and_proven(
    healthy: dict[str, tuple[Job, Simulation]],
):
    made, found = healthy["7b"]
    lines = ["model.layers.0-15 on cuda:0", "model.layers.16-31 on cuda:1"]
    assert kv_lines(found, made.placement) == lines
    text = next(iter(sentences(found, made.placement)))
    assert text.startswith("SIMULATED on cuda:0, cuda:1: ")
    assert "none across devices; KV of model.layers.0-15 on cuda:0; " in text


@pytest.mark.parametrize("name", ["offloaded", "on-disk"])
def test_offloaded_layers_run_on_the_lowest_card(
    healthy: dict[str, tuple[Job, Simulation]], name: str
):
    made, found = healthy[name]
    away = [u.name for u in made.placement.units
            if u.kv and made.placement.module_map[u.name] in ("cpu", "disk")]  # fmt: skip
    assert away
    assert found.status == "proven", found.message
    assert {found.kv[layer] for layer in away} == {"cuda:0"}


def test_what_the_simulation_does_not_have_is_said(healthy: dict[str, tuple[Job, Simulation]]):
    assert healthy["on-disk"][1].left_out == ("the disk: offloaded tensors were kept in RAM",)
    made, found = healthy["nf4"]
    assert found.status == "proven"
    last = list(sentences(found, made.placement))[-1]
    assert last == "not simulated: the kernels of nf4: linears ran in float32"


def test_one_card_is_proven_whatever_its_number(healthy: dict[str, tuple[Job, Simulation]]):
    assert healthy["single-gpu"][1].status == "proven"
    assert set(healthy["single-gpu"][1].kv.values()) == {"cuda:0"}
    assert set(healthy["last-gpu"][1].kv.values()) == {f"cuda:{LAST}"}


def test_a_plan_without_accelerators_is_not_applicable(
    healthy: dict[str, tuple[Job, Simulation]],
):
    found = healthy["cpu"][1]
    assert (found.status, found.message) == ("not applicable", "plans no accelerator")


@FORKED
def test_planted_faults_are_caught_with_modules_and_devices(tmp_path: Path):
    plain, tied = job(tmp_path / "m"), job(tmp_path / "tied", tie=True)
    block = "model.layers.1"
    # a tensor is no module, so nothing moves to it what its module is given
    norm = f"{block}.input_layernorm"
    rest = (f"{block}.self_attn", f"{block}.post_attention_layernorm", f"{block}.mlp")
    apart = {f"{norm}.weight": 1, **dict.fromkeys(rest, 0)}
    jobs = [
        mapped(plain, apart, without=(block,)),
        mapped(tied, {"lm_head": 1}),
        mapped(plain, {}, without=("model.norm",)),
    ]
    mixed, head, lost = simulate_all(jobs)
    assert [found.status for found in (mixed, head, lost)] == ["refuted"] * 3
    assert mixed.message == f"{norm} mixes cuda:0 and cuda:1 in one operation (mul)"
    assert mixed.tensors == (norm,)
    assert head.failure_class == "F8"
    assert head.tensors == ("lm_head.weight", "model.embed_tokens.weight")
    assert lost.failure_class == "F10"
    assert "model.norm.weight" in lost.message
    assert all(found.error is not None and found.error.exit_status == 8 for found in
               (mixed, head, lost))  # fmt: skip


@FORKED
def test_kv_that_is_not_where_it_was_reserved_is_refuted(tmp_path: Path):
    """`module_map`, by which memory was counted, says one card; what `load` gets, the other."""
    layer = "model.layers.3"
    (found,) = simulate_all([mapped(job(tmp_path / "m"), {layer: 0})])
    assert (found.status, found.failure_class) == ("refuted", "F20")
    assert f"the KV cache of {layer} is on cuda:0; the plan reserved it on cuda:1" in found.message


def moving(folder: Path, moves: Iterable[str]) -> list[Simulation]:
    """What comes of strategies whose place_inputs is `tensor.MOVE` for each."""
    hook = "@hookimpl\ndef place_inputs(model, inputs):\n    return {name: tensor.%s for "
    more = "name, tensor in inputs.items()}\n"
    return simulate_all([mine(folder / str(n), hook % move + more) for n, move in enumerate(moves)])


@FORKED
def test_inputs_that_go_elsewhere_are_refuted(tmp_path: Path):
    said = {
        "to('cuda:1')": "place_inputs put input_ids on cuda:1; inputs belong on cuda:0 (F7)",
        "to('cpu')": "place_inputs put input_ids on cpu; inputs belong on cuda:0 (F7)",
        "to('no-such')": "place_inputs raised RuntimeError",
    }
    found = moving(tmp_path, said)
    assert [one.status for one in found] == ["refuted"] * 3
    for one, words in zip(found, said.values(), strict=True):
        assert words in one.message


@FORKED
def test_a_card_may_be_named_in_any_of_torchs_ways(tmp_path: Path):
    moves = ("to(0)", "to('cuda')", "cuda()", "cuda(0)", "to('cuda:0')", "to(device='cuda:0')")
    found = moving(tmp_path, moves)
    assert [(one.status, one.message) for one in found] == [("proven", "")] * len(moves)


@FORKED
def test_what_depends_on_values_is_not_simulated_and_says_so(tmp_path: Path):
    """As a model's forward would that looks at its numbers."""
    hook = """@hookimpl
def place_inputs(model, inputs):
    from service.placement.inputs import to_input_device

    norm = model.model.layers[2].input_layernorm
    weight = norm.weight
    norm.register_forward_pre_hook(lambda module, args: (args[0] * weight.sum().item(),))
    return to_input_device(model, inputs)
"""
    (found,) = simulate_all([mine(tmp_path, hook)])
    assert (found.status, found.error) == ("not simulated", None)
    assert "DataDependent" in found.message


def test_a_simulation_that_ends_early_says_so_for_what_is_left(tmp_path: Path):
    dies = mine(tmp_path, "@hookimpl\ndef place_inputs(model, inputs):\n    import os\n\n"
                          "    os._exit(9)\n")  # fmt: skip
    first, second, third = simulate_all([job(tmp_path / "a"), dies, job(tmp_path / "b")])
    assert first.status == "proven"
    assert second.status == third.status == "not simulated"
    assert "the simulation ended with status 9" in second.message


def test_maps_that_transformers_makes_itself_are_not_simulated(tmp_path: Path):
    plain = job(tmp_path / "m")
    auto = replace(plain.placement, load_kwargs={"device_map": "auto"})
    bare = replace(plain.placement, load_kwargs={}, module_map={})
    found = simulate_all([replace(plain, placement=auto), replace(plain, placement=bare)])
    said = ("not simulated", "the plan names no device for its modules")
    assert [(one.status, one.message) for one in found] == [said, said]


def test_a_torch_that_cannot_pretend_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(backend_registration, "_setup_privateuseone_for_python_backend")
    with pytest.raises(pretended.NotAvailable, match=r"torch .* cannot pretend devices"):
        pretended._install()


def test_the_default_llama_has_the_shape_of_seven_billion():
    config = CONFIG_MAPPING["llama"]()
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 32)


def command(folder: Path, *words: str) -> Any:
    config = folder / "moorage.yaml"
    config.write_text(
        "version: 1\ndeployments:\n  d:\n"
        f"    model: {folder / 'm'}\n    strategy_dirs: [{folder / 'strategies'}]\n"
    )
    return CliRunner().invoke(app, ["plan", "--config", str(config), "--simulate", *words])


def test_the_command_proves_a_plan_and_exits_with_8_when_it_is_refuted(tmp_path: Path):
    hook = "@hookimpl\ndef place_inputs(model, inputs):\n    return {'input_ids': "
    mine(tmp_path, f"{hook}inputs['input_ids'].to('cuda:1')}}\n")
    two = ("--hardware", "2x24GiB")
    proven = command(tmp_path, "--strategy", "auto-shard", *two)
    assert proven.exit_code == 0, proven.output
    assert "SIMULATED on cuda:0, cuda:1: " in proven.output
    refuted = command(tmp_path, "--strategy", "mine", *two, "--json")
    assert refuted.exit_code == 8, refuted.output
    document = json.loads(refuted.stdout)["simulation"]
    assert document["status"] == "refuted"
    assert document["error"]["failure_class"] == "F7"


def test_the_command_says_why_it_simulated_nothing(tmp_path: Path):
    mine(tmp_path, "@hookimpl\ndef place_inputs(model, inputs):\n    return dict(inputs)\n")
    none = command(tmp_path, "--strategy", "cpu")
    assert none.exit_code == 0, none.output
    assert "not applicable: plans no accelerator" in none.output
    small = command(tmp_path, "--strategy", "auto-shard", "--hardware", "1MiB")
    assert small.exit_code == 4, small.output
    assert "not simulated: it does not fit" in small.output
