"""`moorage certify`: a certificate without a server, and the exit status of what refuses it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file

from tests.cli.conftest import Run
from tests.cli.conftest import as_json
from tests.support.planned import write_strategy
from tests.support.tiny import save_tiny

SMALL = ("--set", "max_context=64", "--set", "max_sequences=1")
RELEASE = """

from service.placement.hookspecs import hookimpl as mark


@mark
def release(model):
    with open("released", "w") as file:
        file.write(type(model).__name__)
"""


def strategy_that(tmp_path: Path, load: str) -> tuple[str, ...]:
    """Flags that select a strategy whose `load` ends with these lines."""
    start = "    return AutoModelForCausalLM.from_pretrained("
    path = tmp_path / "strategies" / "mine.py"
    write_strategy(path, RELEASE)
    text = path.read_text()
    assert start in text
    arguments = "config.folder, **placement.load_kwargs)"
    path.write_text(
        text.replace(start + arguments, f"{start.replace('return', 'model =')}{arguments}\n{load}")
    )
    return ("--strategy", "mine", "--set", "strategy_dirs=[strategies]")


def test_a_sound_model_gets_a_table_and_the_last_line_says_proven(run: Run, tiny: Path) -> None:
    result = run("certify", "--model", tiny, *SMALL)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "deployment default   tiny   strategy cpu   quantize none"
    assert lines[1].split() == ["check", "result", "checked", "ms"]
    rows = [line.split() for line in lines[2:16]]
    assert [row[0] for row in rows][:3] == ["F1", "F2", "F3"]
    assert rows[-1][0] == "forward"
    assert {row[1] for row in rows} == {"pass"}
    assert lines[-2].startswith("cpu: ")
    assert lines[-1].startswith("PROVEN in ")
    assert result.stderr == ""


def test_as_json_it_is_a_document_with_what_was_planned_and_measured(run: Run, tiny: Path) -> None:
    result = run("certify", "--model", tiny, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    made = as_json(result)
    assert (made["object"], made["schema"]) == ("certificate", 1)
    assert made["model"]["id"] == "tiny"
    assert made["strategy"]["name"] == "cpu"
    assert made["certificate"]["valid"] is True
    assert made["certificate"]["tensors_sampled"] > 0
    assert made["certificate"]["versions"]["moorage"]
    [device] = made["devices"]
    assert device["measured"]["allocated"] == device["planned"]["weights"]
    assert device["plan_error_bytes"] == 0
    assert made["error"] is None
    assert made["warnings"] == []


def test_a_refused_certificate_is_printed_all_the_same_and_exits_8(
    run: Run, tiny: Path, tmp_path: Path
) -> None:
    mine = strategy_that(
        tmp_path, "    model.model.norm.weight.data.zero_()\n    return model.eval()"
    )
    result = run("certify", "--model", tiny, *mine, *SMALL)
    assert result.exit_code == 8, result.output
    failed = [line.split() for line in result.stdout.splitlines() if " fail " in line]
    assert [row[0] for row in failed] == ["F16"]
    assert result.stdout.splitlines()[-1].startswith("REFUSED in ")
    [line] = result.stderr.splitlines()
    assert line.startswith("moorage: model.norm.weight differs from model.safetensors (F16)")
    assert "  fix: " in line
    made = as_json(run("certify", "--model", tiny, *mine, *SMALL, "--json"))
    assert made["certificate"]["valid"] is False
    assert made["error"]["failure_class"] == "F16"
    assert made["error"]["tensors"] == ["model.norm.weight"]


@pytest.mark.parametrize(("load", "status"), [("", 0), ("    model.lm_head.to('meta')\n", 8)])
def test_the_model_is_released_whatever_came_out(
    run: Run, tiny: Path, tmp_path: Path, load: str, status: int
) -> None:
    mine = strategy_that(tmp_path, f"{load}    return model.eval()")
    assert run("certify", "--model", tiny, *mine, *SMALL).exit_code == status
    assert (tmp_path / "released").read_text() == "LlamaForCausalLM"


def test_what_is_refused_before_exits_with_its_own_status(
    run: Run, tiny: Path, tmp_path: Path
) -> None:
    for words, status, said in (
        (("--model", tiny, "--strategy", "nobody"), 3, "nobody"),
        (("--model", tiny, "--strategy", "single-gpu"), 4, "(F19)"),
        (("--model", tmp_path / "nowhere"), 6, "nowhere"),
    ):
        result = run("certify", *words, *SMALL)
        assert result.exit_code == status, result.output
        assert said in result.stderr
        assert result.stdout == ""


def test_a_checkpoint_that_lacks_a_tensor_exits_8_and_is_json_too(run: Run, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("certify", "--model", folder, *SMALL, "--json")
    assert result.exit_code == 8
    assert as_json(result)["error"]["failure_class"] == "F15"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantisation_is_certified_too(run: Run, tiny: Path, quantize: str) -> None:
    made = as_json(run("certify", "--model", tiny, "--quantize", quantize, *SMALL, "--json"))
    assert made["certificate"]["quantized_linears"] == 2 * 7
    assert made["model"]["quantize"] == quantize
