import argparse
import importlib
import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks import table
from benchmarks import workload
from benchmarks.__main__ import COMMANDS
from benchmarks.__main__ import main
from benchmarks.clients import body
from benchmarks.engine import parser as engine_parser
from benchmarks.plot import bars
from benchmarks.serve import parser as serve_parser
from benchmarks.settings import least_and_most
from benchmarks.settings import whole_numbers
from benchmarks.workload import Request

SAMPLE = Path(__file__).parent / "sample.json"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_with_help(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_without_a_name_the_commands_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["enigne"]) == 2
    assert "there is no benchmark 'enigne'" in capsys.readouterr().err


def test_numbers_of_streams_are_read():
    assert whole_numbers("1,8,32") == [1, 8, 32]
    assert engine_parser().parse_args(["--streams", "2,4"]).streams == [2, 4]
    assert serve_parser().parse_args([]).streams == [1, 8, 32]


@pytest.mark.parametrize("text", ["", "a", "0", "1,-2", "1,,2"])
def test_what_is_no_number_of_streams_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        whole_numbers(text)


@pytest.mark.parametrize("text", ["5", "9,5", "1,2,3"])
def test_what_is_no_range_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        least_and_most(text)


@pytest.mark.parametrize("make", [workload.ids, workload.texts])
def test_requests_are_the_same_for_a_seed_and_others_for_another(make):
    lengths = workload.Lengths((5, 9), (2, 4))
    first = make(20, lengths, 1)
    assert first == make(20, lengths, 1)
    assert first != make(20, lengths, 2)
    assert {request.tokens for request in first} == {2, 3, 4}
    assert [Request.of(json.loads(json.dumps(r.as_dict()))) for r in first] == first


def test_prompts_have_the_lengths_that_were_asked_for():
    lengths = workload.Lengths((5, 9), (2, 4))
    assert {len(request.ids) for request in workload.ids(100, lengths, 1)} == {5, 6, 7, 8, 9}


def test_prompts_over_http_are_as_long_as_those_in_process():
    lengths = workload.Lengths((50, 200), (2, 9))
    here, there = workload.ids(50, lengths, 3), workload.texts(50, lengths, 3)
    assert [request.tokens for request in here] == [request.tokens for request in there]
    words = [round(len(request.ids) / workload.TOKENS_A_WORD) for request in here]
    assert [len(request.text.split()) for request in there] == words


def test_each_server_is_told_in_its_own_words_not_to_end_early():
    ours = body("openai", "m", Request(7, text="hello"))
    assert (ours["max_tokens"], ours["ignore_eos"]) == (7, True)
    theirs = body("transformers", "m", Request(7, text="hello"))
    assert json.loads(theirs["generation_config"])["eos_token_id"] == -1
    assert "stream_options" not in theirs


def test_the_table_has_medians_spreads_and_ratios_of_neighbouring_runs():
    text = table.markdown(results.read(SAMPLE))
    lines = text.splitlines()
    assert lines[0] == "| output tokens a second | 1 stream | 8 streams |"
    assert "| moorage | 35 (30-40) | 80 (80-80) |" in lines
    assert "| other | 15 (10-20), 2.50x |  |" in lines
    assert "| time to first token, ms, median | 1 stream | 8 streams |" in lines
    assert "| moorage | 20 | 50 |" in lines
    assert "| the same while a 4,096-token prompt is computed, ms | 220 |" in lines
    assert "third: not measured, it is not installed." in lines
    assert "A CPU, 2 cores; moorage 0.1.0, torch 2.13.0; 2026-01-02, commit abc1234." in text


def test_a_result_without_rows_says_so():
    assert table.markdown({"rows": []}) == "Nothing was measured.\n"


def test_the_table_command_prints_the_files_it_is_given(capsys: pytest.CaptureFixture[str]):
    assert main(["table", str(SAMPLE)]) == 0
    assert capsys.readouterr().out == table.markdown(results.read(SAMPLE))


def test_a_missing_bar_stays_empty():
    streams, found = bars(results.read(SAMPLE))
    assert streams == [1, 8]
    assert found["moorage"][1] == {"median": 80.0, "low": 80.0, "high": 80.0}
    assert found["other"][1] is None


def test_a_result_says_what_it_was_measured_with(tmp_path: Path):
    made = results.begin("engine", {"runs": 3})
    assert made["settings"] == {"runs": 3}
    assert made["machine"]["cpu"]
    results.save(tmp_path / "new" / "engine.json", made)
    assert results.read(tmp_path / "new" / "engine.json") == made
