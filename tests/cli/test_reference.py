"""docs/cli.md is made from the commands."""

from pathlib import Path

from service.cli import reference

PAGE = Path(__file__).resolve().parents[2] / "docs/cli.md"


def test_the_page_of_the_command_line_is_made_from_the_commands():
    said = "run: python -m service.cli.reference > docs/cli.md"
    assert PAGE.read_text(encoding="utf-8") == reference.markdown(), said


def test_a_command_is_summed_up_by_its_first_sentence():
    page = reference.markdown()
    assert "* `certify`: Plan, load and prove without serving.\n" in page
    assert "..." not in page.partition("**Commands:**")[2].partition("## ")[0]
