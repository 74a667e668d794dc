"""`moorage bench`: what is measured, what is not, and what is said when a server will not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.conftest import as_json
from tests.support.speaking import KEY
from tests.support.speaking import Server
from tests.support.speaking import speaking
from tests.support.terminal import on_terminal

SMALL = ("--clients", "1,2", "--requests", "3", "--prompt", "41", "--output", "5")


@pytest.fixture
def server(run: Run) -> Iterator[Server]:
    with speaking() as server:
        yield server


def test_every_number_of_clients_has_a_row_of_aligned_figures(run: Run, server: Server) -> None:
    result = run("bench", server.url, *SMALL)
    assert result.exit_code == 0, result.output
    title, heading, *rows = result.stdout.splitlines()
    assert title.startswith(f"one at {server.url}   prompts of about 41 tokens   answers of 5")
    assert heading.split()[:4] == ["clients", "answered", "failed", "tokens/s"]
    assert [row.split()[:5] for row in rows] == [
        ["1", "3", "of", "3", "0"],
        ["2", "3", "of", "3", "0"],
    ]
    assert {len(line) for line in (heading, *rows)} == {len(heading)}
    assert len(heading) <= 80
    assert "note:" not in result.stderr


def test_tokens_are_counted_by_usage_and_prompts_have_their_length(
    run: Run, server: Server
) -> None:
    made = as_json(run("bench", server.url, *SMALL, "--json"))
    assert made["counted_by"] == "usage"
    for row in made["rows"]:
        assert (row["answered"], row["failed"], row["tokens"]) == (3, 0, 15)
        assert row["prompt_tokens"] == 3 * 41  # 5 of the template, 2 for each word
        assert row["rate"] == pytest.approx(15 / row["seconds"])
        assert row["requests_rate"] == pytest.approx(3 / row["seconds"])
    prompts = [asked["messages"][0]["content"] for asked in server.asked[3:]]
    assert len(set(prompts)) == 6, "the same prompt again would be in the prefix cache"


def test_an_empty_first_piece_is_not_the_first_token(run: Run, server: Server) -> None:
    server.first_s = 0.2
    (row,) = as_json(run("bench", server.url, *SMALL, "--clients", "1", "--json"))["rows"]
    assert row["first_ms"] >= 200


def test_a_server_that_counts_nothing_is_counted_by_pieces_and_it_is_said(
    run: Run, server: Server
) -> None:
    server.counts = False
    result = run("bench", server.url, *SMALL, "--json")
    assert as_json(result)["rows"][0]["tokens"] == 15
    assert as_json(result)["counted_by"] == "pieces of text"
    assert "pieces of text" in run("bench", server.url, *SMALL).stderr


def test_a_server_that_refuses_fields_of_others_is_asked_without_them(
    run: Run, server: Server
) -> None:
    server.strict = True
    made = as_json(run("bench", server.url, *SMALL, "--json"))
    assert made["to_the_end"] is False
    assert made["rows"][0]["answered"] == 3


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("http://127.0.0.1:1",), 1, "cannot talk to http://127.0.0.1:1: Connection refused"),
        (("{url}/elsewhere",), 1, "status 404: nothing at /elsewhere/v1/models  fix: give the URL"),
        (("ftp://x",), 2, "no address of a server"),
        (("{url}", "--plot", "nowhere/a.png"), 2, "in a folder that can be written"),
        (("{url}", "--plot", "a.jpg"), 2, "ends with .png"),
        (("{url}", "--clients", "1,none"), 2, "write numbers from 1 to 1024"),
        (("unix:/nowhere/at/all",), 1, "No such file or directory"),
    ],
)
def test_what_cannot_be_measured_is_told_with_its_status(
    run: Run, server: Server, words: tuple[str, ...], status: int, said: str
) -> None:
    result = run("bench", *(word.format(url=server.url) for word in words))
    assert result.exit_code == status
    assert said in " ".join(result.stderr.replace("│", " ").split()).replace("fix:", " fix:")
    assert result.stdout == ""


def test_a_wrong_key_and_a_full_server_say_what_to_do(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert run("bench", server.url, *SMALL).exit_code == 0
    monkeypatch.setenv("MOORAGE_API_KEY", "wrong")
    refused = run("bench", server.url, *SMALL)
    assert refused.exit_code == 1
    assert "status 401: that key is wrong  fix: set MOORAGE_API_KEY" in refused.stderr
    monkeypatch.delenv("MOORAGE_API_KEY")
    server.busy = True
    full = run("bench", server.url, *SMALL)
    assert full.exit_code == 1
    assert "status 429: too many  fix: ask less at once, or wait (Retry-After: 7 s)" in full.stderr


def test_errors_while_it_measures_are_counted_with_what_they_say(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.cli import bench

    settle = bench.Asked.settle

    def then_busy(asked: bench.Asked) -> None:
        settle(asked)
        server.busy = True

    monkeypatch.setattr(bench.Asked, "settle", then_busy)
    result = run("bench", server.url, *SMALL)
    assert result.exit_code == 1
    assert "0 of 3" in result.stdout
    assert f"clients 2: 3 of 3 failed: {server.url} refused with status 429" in result.stderr


def test_the_plot_is_a_picture(run: Run, server: Server, tmp_path: Path) -> None:
    assert run("bench", server.url, *SMALL, "--plot", "out.png").exit_code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    result = run("bench", server.url, "--plot", "out.png")
    assert result.exit_code == 4
    assert "needs matplotlib, which is not installed  fix: pip install 'moorage[bench]'" in (
        result.stderr
    )
    assert server.asked == []


def test_ctrl_c_ends_with_what_was_measured_so_far(tmp_path: Path) -> None:
    with speaking() as server:
        words = ("--clients", "1", "--requests", "5000", "--prompt", "9", "--output", "2")
        with on_terminal("bench", server.url, *words, cwd=tmp_path) as terminal:
            terminal.wait_for("1 client")
            while len(server.asked) < 20:
                server.pause.wait(0.02)
            terminal.type("\x03")
            assert terminal.wait() == 0
        screen = terminal.screen
    assert any("of 5000" in line for line in screen)
    assert any(line.startswith("note: interrupted") for line in screen)
    assert not any("%" in line and "client" in line for line in screen), "the bar is wiped"
