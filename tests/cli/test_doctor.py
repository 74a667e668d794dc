"""`moorage doctor`: everything wrong, each with its fix."""

import importlib.util
import json
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.cli import doctor
from service.cli.doctor import Finding
from service.testing.self_test.quantised import PACKING
from service.testing.self_test.quantised import packs
from tests.cli.conftest import Run
from tests.cli.conftest import as_json


def texts(result: Any, level: str) -> list[str]:
    return [f["text"] for f in as_json(result)["findings"] if f["level"] == level]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address that can be bound, set as the one to bind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MOORAGE_BIND", address)
    return address


def test_a_sound_deployment_is_ok_in_every_line(run: Run, tiny: Path, free: str) -> None:
    result = run("doctor", "--set", f"model={tiny}", "--json")
    assert result.exit_code == 0, result.output
    assert as_json(result)["errors"] == 0
    found = texts(result, "ok")
    assert found[0].startswith("python 3.")
    assert f"model tiny: {tiny}" in found
    assert f"{free} is free" in found
    assert any(text.startswith("strategy cpu; ") for text in found)


def test_lines_say_level_text_and_fix() -> None:
    assert doctor.lines(Finding("ok", "fine"), None) == [" ok    fine"]
    assert doctor.lines(Finding("warn", "hm"), None) == [" WARN  hm"]
    assert doctor.lines(Finding("error", "no", "do this"), None) == [" ERROR no   fix: do this"]


def test_errors_are_counted_and_exit_5(run: Run, tmp_path: Path, free: str) -> None:
    result = run("doctor", "--set", f"model={tmp_path / 'gone'}", "--set", "strategy=nobody")
    assert result.exit_code == 5
    assert result.stdout.splitlines()[-1].startswith("2 errors, ")
    assert "unknown strategy 'nobody'" in result.stdout
    assert "no such folder" in result.stdout


def test_mistakes_in_the_config_are_findings(run: Run, tmp_path: Path) -> None:
    (tmp_path / "moorage.yaml").write_text(
        "version: 1\ndeployments:\n  a:\n    strategey: cpu\n    max_context: 0\n"
    )
    result = run("doctor")
    assert result.exit_code == 5
    assert " ERROR moorage.yaml:4:5: " in result.stdout
    assert " ERROR moorage.yaml:5:" in result.stdout


def test_old_variables_are_warnings(
    run: Run, tiny: Path, free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE_MAP", "cpu")
    result = run("doctor", "--set", f"model={tiny}", "--json")
    assert result.exit_code == 0
    assert any(
        "DEVICE_MAP" in text and "MOORAGE_STRATEGY" in text for text in texts(result, "warn")
    )


def test_a_broken_strategy_is_an_error_with_file_and_line(
    run: Run, tiny: Path, tmp_path: Path, free: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "odd.py").write_text("\nimport tritonx\n")
    result = run("doctor", "--set", f"model={tiny}", "--set", "strategy_dirs=[./mine]", "--json")
    assert result.exit_code == 5
    (error,) = texts(result, "error")
    assert "No module named 'tritonx' (odd.py:2)" in error


def test_options_that_the_strategy_refuses_are_errors(run: Run, tiny: Path, free: str) -> None:
    settings = ("--set", f"model={tiny}", "--set", "strategy=single-gpu")
    result = run("doctor", *settings, "--set", "options.devise=1", "--json")
    assert result.exit_code == 5
    assert any("devise" in text and "'device'" in text for text in texts(result, "error"))


def test_a_quantizer_that_is_missing_is_named(
    run: Run, tiny: Path, free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else real(n, *a)
    )
    result = run("doctor", "--set", f"model={tiny}", "--set", "quantize=nf4")
    assert result.exit_code == 5
    expected = "quantize: nf4 needs bitsandbytes, which is not installed.   fix: pip install"
    assert expected in result.stdout


def test_a_model_that_was_not_fetched_is_a_warning(run: Run, free: str) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    assert any("smollm2-135m is not here yet" in text for text in texts(result, "warn"))


def test_a_port_in_use_is_an_error(run: Run, tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run(
            "doctor", "--set", f"model={tiny}", "--set", f"server.bind={address}", "--json"
        )
    assert texts(result, "error") == [f"bind {address}: another process uses it"]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = doctor.cache(tmp_path / "file" / "below")
    assert finding.level == "error"
    assert "MOORAGE_CACHE" in str(finding.fix)


def test_missing_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert list(doctor.shared_memory(tmp_path)) == []
    (finding,) = doctor.shared_memory(tmp_path / "none")
    assert finding.level == "warn"


def test_another_plugins_package_in_front_of_ours_is_an_error(
    run: Run, tiny: Path, free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plugins

    monkeypatch.setattr(plugins, "__file__", "/elsewhere/plugins/__init__.py")
    result = run("doctor", "--set", f"model={tiny}", "--json")
    assert result.exit_code == 5
    assert any("/elsewhere/plugins" in text for text in texts(result, "error"))


def test_memory_that_others_use_is_named_with_their_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU-abc, 41213'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gib = 2**30
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 1),
        ("mem_get_info", lambda index: (14 * gib, 24 * gib)),
        ("get_device_name", lambda index: "RTX 4090"),
        ("get_device_properties", lambda index: SimpleNamespace(uuid="abc")),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    found = [line for finding in doctor.devices() for line in doctor.lines(finding, None)]
    assert found == [
        " ok    cuda:0: RTX 4090, 14.0 of 24.0 GiB free",
        " WARN  cuda:0: 10.0 GiB in use by pid 41213. plan counts it as taken.",
    ]


# --- the self-test


def test_the_self_test_finds_every_reproduction_caught(run: Run, tiny: Path, free: str) -> None:
    result = run("doctor", "--set", f"model={tiny}", "--self-test", "--json")
    assert result.exit_code == 0, result.output
    found = [text for text in texts(result, "ok") if re.match(r"F\d+ ", text)]
    assert [text.split()[0] for text in found] == [f"F{number}" for number in range(1, 23)]
    ends = (": still so with these versions; caught", f": not tried, {PACKING}")
    assert all(text.endswith(ends) for text in found), found
    tried = [text for text in found if text.endswith("; caught")]
    assert len(tried) == (22 if packs() else 21)


def outcome(there: bool | None, caught: bool | None) -> dict[str, Any]:
    found = {"failure_class": "F8", "what": "a pair apart", "there": there, "caught": caught}
    return {**found, "why": "a cable is missing"}


@pytest.mark.parametrize(
    ("there", "caught", "level", "words"),
    [
        (True, True, "ok", "F8 a pair apart: still so with these versions; caught"),
        (False, True, "ok", "F8 a pair apart: no longer so with these versions; caught"),
        (False, None, "ok", "F8 a pair apart: no longer so with these versions"),
        (None, None, "ok", "F8 a pair apart: not tried, a cable is missing"),
        (None, False, "warn", "F8 a pair apart: could not be tried: a cable is missing"),
        (True, False, "error", "F8 a pair apart: still so with these versions, and NOT caught"),
    ],
)
def test_an_outcome_is_an_error_only_if_ours_misses_it(
    monkeypatch: pytest.MonkeyPatch,
    there: bool | None,
    caught: bool | None,
    level: str,
    words: str,
) -> None:
    line = json.dumps(outcome(there, caught))
    monkeypatch.setattr(doctor, "SELF_TEST", f"print({line!r})")
    [finding] = doctor.reproductions()
    assert (finding.level, finding.text) == (level, words)
    assert (finding.fix is None) == (level == "ok")


def test_a_self_test_that_breaks_off_is_an_error_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "SELF_TEST", "raise OSError('no space left')")
    [finding] = doctor.reproductions()
    assert finding.level == "error"
    assert finding.text == "the self-test broke off: OSError: no space left"


def test_a_miss_is_exit_5(run: Run, tiny: Path, free: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(outcome(True, False))
    monkeypatch.setattr(doctor, "SELF_TEST", f"print({line!r})")
    words = ("doctor", "--set", f"model={tiny}")
    assert run(*words).exit_code == 0
    assert run(*words, "--self-test").exit_code == 5
