"""`moorage config`, and what all commands share: options, errors, output."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from ruamel.yaml import YAML
from typer.testing import CliRunner
from typer.testing import Result

from service.cli import config as command
from service.cli import options
from service.cli import report
from service.config import reading
from service.config.flags import Flags
from service.errors import DoesNotFit

WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(command.app, arguments, env={**WIDE, **(env or {})})


def test_show_prints_a_file_that_loads_again(example: Path, folder: Path) -> None:
    result = run("show", "--deployment", "mine", "--set", "keep_free.cuda=1GiB")
    assert result.exit_code == 0
    (folder / "again.yaml").write_text(result.stdout)
    env = {"HOME": "/home/someone"}
    again = reading.load(Path("again.yaml"), env, Flags())
    first = reading.load(example, env, Flags(None, "mine", (("keep_free.cuda", "1GiB", "--set"),)))
    assert again.deployment == first.deployment
    assert again.server == first.server
    assert again.name == "mine"


def test_show_with_origins_says_where_every_value_came_from(example: Path) -> None:
    result = run("show", "--origin", "--quantize", "fp4", env={"MOORAGE_MAX_CONTEXT": "512"})
    lines = {
        line.split(":")[0].strip(): line.partition("  # ")[2] for line in result.stdout.splitlines()
    }
    assert lines["model"] == "moorage.yaml:18"
    assert lines["max_context"] == "env MOORAGE_MAX_CONTEXT"
    assert lines["quantize"] == "flag --quantize"
    assert lines["dtype"] == "built-in"
    assert lines["# API keys"] == "moorage.yaml:9"


def test_show_as_json_has_values_origins_and_notices(example: Path) -> None:
    result = run("show", "--json", env={"DEVICE_MAP": "auto"})
    document = json.loads(result.stdout)
    assert document["deployment"] == "laptop"
    assert document["values"]["strategy"] == "auto-shard"
    assert document["origins"]["strategy"] == "env DEVICE_MAP"
    assert document["server"]["threads"] == 64
    assert len(document["notices"]) == 1
    assert document["api_keys"] == 1
    assert "first-key" not in result.output


def test_show_prints_notices_on_stderr(example: Path) -> None:
    result = run("show", env={"DEVICE_MAP": "auto"})
    assert result.stderr.startswith("note: DEVICE_MAP is set in the environment and overrides")
    assert "note:" not in result.stdout


def test_values_that_yaml_would_misread_are_quoted(folder: Path) -> None:
    odd = ["true", "12", "a: b", "x # y", "[a]", "", "a\nb", "\U0001f600", "\x7f", "null"]
    text = json.dumps({"version": 1, "deployments": {"a": {"options": {"odd": odd}}}})
    (folder / "moorage.yaml").write_text(text.replace("\\ud83d\\ude00", "\U0001f600"))
    result = run("show")
    assert YAML(typ="safe").load(result.stdout)["deployments"]["a"]["options"]["odd"] == odd


def test_every_mistake_is_printed_and_the_exit_status_is_3(folder: Path) -> None:
    (folder / "moorage.yaml").write_text("version: 1\ndeployments:\n  a: {modl: x, dtype: y}\n")
    result = run("show")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == (
        "moorage.yaml:3:7: deployments.a.modl: unknown key; did you mean 'model'?\n"
        "     a: {modl: x, dtype: y}\n"
        "         ^\n"
        "moorage.yaml:3:16: deployments.a.dtype is 'y'; valid: auto, float32, bfloat16, float16\n"
        "     a: {modl: x, dtype: y}\n"
        "                  ^\n"
    )


def test_who_asks_for_json_gets_the_error_as_json_too(folder: Path) -> None:
    result = run("show", "--json", "--config", "gone.yaml")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["code"] == "invalid_config"


def test_a_set_without_a_value_is_a_usage_error(folder: Path) -> None:
    result = run("show", "--set", "max_context")
    assert result.exit_code == 2
    assert "'max_context' is not KEY=VALUE" in result.stderr


def test_schema_prints_json(folder: Path) -> None:
    for arguments in (("schema",), ("schema", "--json")):
        assert json.loads(run(*arguments).stdout)["title"] == "moorage.yaml"


def test_init_writes_a_file_that_loads_and_its_schema(folder: Path) -> None:
    result = run("init")
    assert result.exit_code == 0, result.output
    config = reading.load(Path("moorage.yaml"), {"HOME": "/home/someone"}, Flags())
    assert (config.name, config.deployment.strategy) == ("laptop", "cpu")
    assert config.notices == ()
    assert json.loads((folder / "moorage.schema.json").read_text())["title"] == "moorage.yaml"


def test_what_init_has_commented_out_loads_too(folder: Path) -> None:
    run("init")
    file = folder / "moorage.yaml"
    lines = file.read_text().splitlines()
    uncommented = [re.sub(r"^( +)# ", r"\1", line) for line in lines]
    file.write_text("\n".join(uncommented))
    (folder / "secrets").mkdir()
    (folder / "secrets" / "keys").write_text("k\n")
    config = reading.load(Path("moorage.yaml"), {"HOME": "/home/someone"}, Flags(deployment="gpu"))
    assert [(step.strategy, step.changes) for step in config.deployment.fallback] == [
        ("single-gpu", {"max_context": 2048}),
        ("auto-shard", {}),
        ("cpu", {}),
    ]


def test_show_prints_steps_of_fallback_as_they_are_written(folder: Path) -> None:
    text = "[{strategy: auto-shard, quantize: nf4}, cpu]"
    result = run("show", "--set", f"fallback={text}")
    assert result.exit_code == 0, result.output
    assert f"    fallback: {text}" in result.stdout.splitlines()
    values = json.loads(run("show", "--json", "--set", f"fallback={text}").stdout)["values"]
    assert values["fallback"] == [{"strategy": "auto-shard", "quantize": "nf4"}, "cpu"]


def test_init_overwrites_only_when_told(folder: Path) -> None:
    (folder / "moorage.yaml").write_text("mine\n")
    result = run("init")
    assert result.exit_code == 3
    assert result.stderr == "moorage.yaml: is there already; --force overwrites it\n"
    assert (folder / "moorage.yaml").read_text() == "mine\n"
    assert not (folder / "moorage.schema.json").exists()
    assert run("init", "--force").exit_code == 0
    assert "version: 1" in (folder / "moorage.yaml").read_text()
    assert run("init").exit_code == 0


def test_init_writes_where_it_is_told(folder: Path) -> None:
    (folder / "etc").mkdir()
    assert json.loads(run("init", "etc", "--json").stdout) == {
        "written": ["etc/moorage.yaml", "etc/moorage.schema.json"]
    }
    assert run("init", "etc/other.yaml").exit_code == 0
    assert (folder / "etc" / "other.yaml").exists()
    result = run("init", "no/such/folder.yaml")
    assert result.exit_code == 3
    assert "no/such/folder.yaml: cannot be written: No such file or directory" in result.stderr


def test_config_needs_neither_torch_nor_transformers(folder: Path) -> None:
    root = Path(command.__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from service.cli import config\n"
        "config.app(['show'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'bitsandbytes'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "strategy: cpu" in done.stdout


# --- what the other commands share


def test_flags_of_their_own_come_after_set() -> None:
    flags = options.flags(
        Path("f"), "d", ["model=a", "options.x=b=c"], model="b", bind="h:1", strategy=None
    )
    assert flags == Flags(
        Path("f"),
        "d",
        (
            ("model", "a", "--set"),
            ("options.x", "b=c", "--set"),
            ("model", "b", "--model"),
            ("server.bind", "h:1", "--bind"),
        ),
    )


def guarded(error: Exception, *arguments: str, env: dict[str, str] | None = None) -> Result:
    app = typer.Typer()

    @app.command()
    @report.guard
    def fail(as_json: options.AsJson = False) -> None:
        raise error

    return CliRunner().invoke(app, arguments, env=env)


def test_an_expected_error_is_one_line_with_its_own_exit_status() -> None:
    result = guarded(DoesNotFit("too\n large", hint="buy more"))
    assert result.exit_code == 4
    assert result.stderr == "moorage: too large  fix: buy more\n"


def test_an_expected_error_is_json_for_who_asked_for_json() -> None:
    result = guarded(DoesNotFit("too large", hint="buy more"), "--json")
    assert json.loads(result.stdout)["error"]["hint"] == "buy more"
    assert result.exit_code == 4


def test_an_unexpected_error_is_one_line_without_a_traceback() -> None:
    result = guarded(KeyError("x\ny"), env={"MOORAGE_DEBUG": ""})
    assert result.exit_code == 1
    assert result.stderr.startswith("moorage: unexpected KeyError: ")
    assert result.stderr.count("\n") == 1


def test_an_unexpected_error_keeps_its_traceback_when_debugging() -> None:
    result = guarded(KeyError("x"), env={"MOORAGE_DEBUG": "1"})
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize(("error", "status"), [(typer.Exit(5), 5), (typer.BadParameter("x"), 2)])
def test_what_typer_handles_is_left_to_typer(error: Exception, status: int) -> None:
    assert guarded(error).exit_code == status


def test_a_table_is_aligned_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(("name", "n"), [("a", 1), ("b" * 200, 22)])
    assert capsys.readouterr().out.splitlines() == [
        f"{'name':200}   n",
        f"{'a':200}   1",
        f"{'b' * 200}  22",
    ]
