"""`moorage plan`: the table, the refusal and what would fit."""

import json
from pathlib import Path

import pytest

from service.cli.plan_text import choices
from service.cli.plan_text import table
from service.placement.alternatives import Alternative
from service.placement.explain import DevicePlan
from service.placement.plan import DeviceMemory
from tests.cli.conftest import Run
from tests.cli.conftest import as_json

GIB = 2**30


def gib(size: float) -> int:
    return int(size * GIB)


def card(index: int, *modules: tuple[str, int]) -> DevicePlan:
    planned = DeviceMemory(gib(18.4), gib(2.5), gib(1.0))
    return DevicePlan(f"cuda:{index}", "RTX 4090", gib(24), gib(23.5), planned, modules)


RIG = (
    card(0, ("embed_tokens", 1), ("layers.0-39", 40)),
    card(1, ("layers.40-79", 40), ("norm", 1), ("lm_head", 1)),
    DevicePlan("cpu", "", gib(62.5), gib(60), DeviceMemory(0, 0, gib(2.1))),
)


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    """A 70B config without weights: enough for a plan."""
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    keys = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def test_the_table_at_120_columns_is_one_aligned_line_a_device() -> None:
    assert table(RIG, 120) == [
        "device           total  free  weights   KV  overhead  left",
        "cuda:0 RTX 4090   24.0  23.5     18.4  2.5       1.0   1.6"
        "  [#######################===-..]  embed_tokens, layers 0-39",
        "cuda:1 RTX 4090   24.0  23.5     18.4  2.5       1.0   1.6"
        "  [#######################===-..]  layers 40-79, norm, lm_head",
        "cpu               62.5  60.0      0.0  0.0       2.1  57.9"
        "  [-............................]",
        "                 # weights  = KV cache  - overhead  . free        GiB",
    ]


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
def test_no_line_of_the_table_is_wider_than_the_terminal(columns: int) -> None:
    lines = table(RIG, columns)
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    assert "layers 40-79, norm, lm_head" in text
    assert len({line.index("[") for line in lines if "[" in line}) == 1
    assert len({line.index("]") for line in lines if "]" in line}) == 1


def test_a_small_share_still_gets_a_mark() -> None:
    (device,) = (DevicePlan("cpu", "", gib(64), gib(64), DeviceMemory(1, 1, 1)),)
    assert "[#=-" in table((device,), 120)[1]


def test_choices_are_aligned() -> None:
    lines = choices(
        (
            Alternative("4-bit", "--set quantize=nf4", gib(36.8), (gib(1.7), gib(1.7))),
            Alternative("a longer name", "(other hardware)", gib(131.4), (gib(9),)),
        ),
        None,
    )
    assert lines == [
        "what would fit         weights  left GiB   try",
        "  1  4-bit            36.8 GiB   1.7+1.7   --set quantize=nf4",
        "  2  a longer name   131.4 GiB       9.0   (other hardware)",
    ]


def test_a_model_that_fits_says_so_with_room_and_bytes(run: Run, tiny: Path) -> None:
    result = run("plan", "--model", tiny, "--hardware", "ram=4GiB", "--set", "max_context=64")
    assert result.exit_code == 0, result.output
    assert "deployment default   tiny" in result.stdout
    assert "FITS. Room for " in result.stdout
    made = as_json(
        run("plan", "--model", tiny, "--hardware", "ram=4GiB", "--set", "max_context=64", "--json")
    )
    assert made["fits"]
    assert made["kv"]["planned_tokens"] == 64 * 8
    (cpu,) = made["devices"]
    planned = cpu["planned"]
    assert cpu["left"] == cpu["free"] - sum(planned.values())
    # float32: a token is 2 layers x 2 heads x (16 + 16) values
    assert made["kv"]["bytes_per_token"] == 2 * 2 * 32 * 4
    assert planned["kv"] == 64 * 8 * made["kv"]["bytes_per_token"]
    weights = (tiny / "model.safetensors").stat().st_size
    assert 0 < weights - (planned["weights"] - 64) < 20_000, "the file has a header besides"


def test_a_plan_needs_no_weights_and_fills_two_cards_evenly(run: Run, llama_70b: Path) -> None:
    words = ("--model", llama_70b, "--strategy", "auto-shard", "--set", "quantize=nf4")
    made = as_json(
        run("plan", *words, "--set", "max_sequences=2", "--hardware", "2x24GiB", "--json")
    )
    assert made["fits"]
    assert made["model"]["parameters"] == 70_553_706_496
    first, second, _ = made["devices"]
    assert abs(first["left"] - second["left"]) < GIB
    assert sum(module["count"] for module in first["modules"]) >= 40


def test_a_model_that_does_not_fit_exits_4_and_says_what_would(run: Run, llama_70b: Path) -> None:
    words = ("--model", llama_70b, "--strategy", "auto-shard", "--set", "max_sequences=2")
    result = run("plan", *words, "--hardware", "2x24GiB")
    assert result.exit_code == 4
    text = result.stdout
    assert "DOES NOT FIT: " in text
    assert 'device_map="auto" would put layers 0-11 on cuda:0' in text
    assert "over PCIe and disk" in text
    assert "Refused because on_no_fit: refuse (built-in)." in text
    assert "--set quantize=nf4" in text
    assert "bfloat16 on 1 x 141 GiB" in text
    made = as_json(run("plan", *words, "--hardware", "2x24GiB", "--json"))
    assert not made["fits"]
    assert made["error"]["failure_class"] == "F20"


def test_every_alternative_that_is_named_does_fit(run: Run, llama_70b: Path) -> None:
    words = ("plan", "--model", llama_70b, "--strategy", "auto-shard", "--hardware", "2x80GiB")
    refused = run(*words, "--set", "max_context=16000", "--json")
    assert refused.exit_code == 4
    flags = [a["try"] for a in as_json(refused)["alternatives"] if a["try"].startswith("--")]
    assert "--set max_sequences=4" in flags
    for flag in flags:
        result = run(*words, "--set", "max_context=16000", *flag.split())
        assert result.exit_code == 0, flag


def test_the_file_and_line_that_refuses_is_named(run: Run, llama_70b: Path) -> None:
    Path("moorage.yaml").write_text(
        "version: 1\ndefaults:\n  on_no_fit: refuse\n"
        "deployments:\n  rig:\n    model: ./llama-70b\n    strategy: auto-shard\n"
    )
    result = run("plan", "--deployment", "rig", "--hardware", "24GiB")
    assert result.exit_code == 4
    assert "(moorage.yaml:3)" in result.stdout


def test_hardware_that_cannot_be_read_is_a_usage_error(run: Run, tiny: Path) -> None:
    result = run("plan", "--model", tiny, "--hardware", "two cards")
    assert result.exit_code == 2
    assert "2x24GiB" in result.stderr


def test_no_accelerator_is_one_line_with_the_way_out(run: Run, tiny: Path) -> None:
    result = run("plan", "--model", tiny, "--strategy", "single-gpu", "--hardware", "ram=8GiB")
    assert result.exit_code == 4
    (line,) = result.stderr.splitlines()
    assert "there is no accelerator (F19)" in line
    assert "strategy: cpu" in line


def test_a_note_says_where_accelerates_own_map_would_overflow(
    run: Run, llama_70b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import accelerate

    # 60 of 80 layers on the first card: weights fit there, with their KV they do not
    lopsided = {"model.embed_tokens": 0, "lm_head": 1, "model.norm": 1, "model.rotary_emb": 1}
    lopsided |= {f"model.layers.{index}": int(index >= 60) for index in range(80)}
    monkeypatch.setattr(accelerate, "infer_auto_device_map", lambda *a, **k: lopsided)
    words = ("--model", llama_70b, "--strategy", "auto-shard", "--hardware", "2x105GiB")
    result = run("plan", *words)
    assert result.exit_code == 0, result.output
    assert (
        "note  accelerate's balanced map (60/20 layers) would overflow cuda:0 by" in result.stdout
    )
    assert "FITS" in result.stdout
    monkeypatch.setattr(
        accelerate,
        "infer_auto_device_map",
        lambda *a, **k: {**lopsided, **{f"model.layers.{i}": int(i >= 40) for i in range(80)}},
    )
    assert "accelerate" not in run("plan", *words).stdout


def test_a_module_is_explained_and_an_unknown_one_refused(run: Run, tiny: Path) -> None:
    words = ("plan", "--model", tiny, "--hardware", "ram=4GiB", "--explain")
    result = run(*words, "model.layers.0.mlp")
    assert result.exit_code == 0, result.output
    assert "why   model.layers.0 has" in result.stdout
    assert "it is on cpu because nothing else computes in this plan" in result.stdout
    made = as_json(run(*words, "lm_head", "--json"))
    assert made["explain"]["module"] == "lm_head"
    assert made["explain"]["device"] == "cpu"
    refused = run(*words, "model.layer.0")
    assert refused.exit_code == 2
    assert "did you mean 'model.layers.0'?" in refused.output


CHAIN = "[{strategy: auto-shard, quantize: nf4, max_context: 1024, max_sequences: 1}, cpu]"


def test_a_refusal_says_what_each_step_of_fallback_would_plan(run: Run, llama_70b: Path) -> None:
    words = ("--model", llama_70b, "--strategy", "auto-shard", "--hardware", "2x24GiB,ram=64GiB")
    result = run("plan", *words, "--set", f"fallback={CHAIN}")
    assert result.exit_code == 4
    lines = result.stdout.splitlines()
    at = lines.index("then, as fallback says")
    assert lines[at + 1].startswith(
        "  1  auto-shard with quantize nf4, max_context 1024, max_sequences 1: "
        "fits, 36.8 GiB of weights; left: "
    )
    assert " on cuda:0, " in lines[at + 1]
    assert lines[at + 2].startswith("  2  cpu: ")
    assert sum("auto-shard with" in line for line in lines) == 1
    made = as_json(run("plan", *words, "--set", f"fallback={CHAIN}", "--json"))
    first, second = made["fallback"]
    assert (first["strategy"], first["quantize"], first["max_context"]) == (
        "auto-shard",
        "nf4",
        1024,
    )
    assert (first["fits"], first["error"], sorted(first["left"])) == (
        True,
        None,
        ["cuda:0", "cuda:1"],
    )
    assert all(size >= 0 for size in first["left"].values())
    assert (second["fits"], second["error"]["code"]) == (False, "does_not_fit")


def test_a_device_that_is_not_there_is_followed_by_the_steps_too(run: Run, tiny: Path) -> None:
    words = ("--model", tiny, "--strategy", "single-gpu", "--set", "fallback=[cpu]")
    result = run("plan", *words, "--hardware", "ram=8GiB")
    assert result.exit_code == 4
    assert "  1  cpu: fits, " in result.stderr
    assert "strategy single-gpu needs cuda:0" in result.stderr


def test_a_plan_that_fits_says_nothing_of_the_steps(run: Run, tiny: Path) -> None:
    words = ("--model", tiny, "--set", "fallback=[auto-shard]", "--hardware", "ram=8GiB")
    assert "fallback" not in run("plan", *words).stdout
    assert as_json(run("plan", *words, "--json"))["fallback"] == []


def test_a_step_with_a_name_that_nobody_has_is_refused(run: Run, tiny: Path) -> None:
    result = run("plan", "--model", tiny, "--set", "fallback=[cppu]")
    assert result.exit_code == 3
    assert "fallback[0]: unknown strategy 'cppu'; did you mean 'cpu'?" in result.stderr
