"""What the README shows is true: its commands exist, its config loads, its strategy works."""

import re
from pathlib import Path

import pytest

from service.config import reading
from service.placement import registry

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", blocks("sh")[0], re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("deployment", ["laptop", "rig"])
def test_its_config_loads_without_a_problem(tmp_path: Path, deployment: str):
    (tmp_path / "moorage.yaml").write_text(blocks("yaml")[0])
    flags = reading.Flags(config=tmp_path / "moorage.yaml", deployment=deployment)
    config = reading.load(tmp_path / "moorage.yaml", {}, flags)
    assert config.name == deployment
    assert not config.notices


def test_its_table_of_strategies_is_what_is_installed():
    table = README.partition("| strategy |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(
        registry.build().strategies
    )


def test_its_strategy_is_the_one_of_the_guide_which_a_test_runs():
    (strategy,) = [block for block in blocks("python") if "hookimpl" in block]
    assert strategy in (ROOT / "docs/plugin-guide.md").read_text(encoding="utf-8")
    statements = [line for line in strategy.splitlines()[1:] if line.strip()]
    assert len(statements) <= 20


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w/.-]+\.md)\)", README))
def test_its_links_lead_somewhere(link: str):
    assert (ROOT / link).is_file()
