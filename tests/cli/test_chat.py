"""`moorage chat`: at a terminal and in a pipe, and nothing that a model says reaches the terminal
as a command.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import chat_session
from service.cli.cleaning import clean
from service.cli.main import app
from tests.cli.conftest import Run
from tests.cli.conftest import as_json
from tests.support.speaking import Server
from tests.support.speaking import speaking
from tests.support.terminal import Terminal
from tests.support.terminal import on_terminal

PROMPT = "\n> "


@pytest.fixture
def server(run: Run) -> Iterator[Server]:
    with speaking() as server:
        yield server


def piped(text: str, *words: str) -> object:
    return CliRunner().invoke(app, ["chat", *words], input=text)


# --- in a pipe


def test_in_a_pipe_stdout_gets_the_answer_and_nothing_else(server: Server) -> None:
    result = piped("what is\nthis?\n", server.url, "--system", "be brief")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "word word word \n", "")
    (asked,) = server.asked
    assert asked["model"] == "one"
    assert asked["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is\nthis?"},
    ]


def test_as_json_it_is_a_document(server: Server) -> None:
    made = as_json(piped("think", server.url, "--model", "two", "--json"))
    assert (made["model"], made["answer"], made["thoughts"]) == ("two", "yes", "hm")
    assert made["finish_reason"] == "stop"
    assert made["usage"]["completion_tokens"] == 3


def test_without_a_url_the_config_says_where(server: Server, tmp_path: Path) -> None:
    bind = server.url.removeprefix("http://")
    (tmp_path / "moorage.yaml").write_text(
        f"version: 1\nserver: {{bind: '{bind}'}}\ndeployments: {{a: {{}}}}\n"
    )
    assert piped("hello").stdout == "word word word \n"
    (tmp_path / "moorage.yaml").write_text("version: 1\nserver: {bind: '127.0.0.1:0'}\n")
    refused = piped("hello")
    assert refused.exit_code != 0


@pytest.mark.parametrize(
    ("question", "said"),
    [("break", "the answer broke off: it broke"), ("stop", "the stream has no end")],
)
def test_an_answer_that_breaks_off_is_an_error(server: Server, question: str, said: str) -> None:
    result = piped(question, server.url)
    assert result.exit_code == 1
    assert result.stdout == "half"
    assert said in result.stderr
    assert "\x1b" not in result.stderr, "a server's words are cleaned, too"


def test_nothing_on_stdin_is_a_usage_error(server: Server) -> None:
    assert piped("  \n", server.url).exit_code == 2
    assert server.asked == []


# --- at a terminal


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Terminal, Server, Path]]:
    folder = tmp_path_factory.mktemp("chat")
    env = {"MOORAGE_CACHE": str(folder / "cache")}
    with (
        speaking() as server,
        on_terminal("chat", server.url, cwd=folder, env=env) as terminal,
    ):
        terminal.wait_for("> ")
        yield terminal, server, folder


def say(terminal: Terminal, line: str, until: str = PROMPT) -> str:
    """Type a line and return what came until there is a prompt again."""
    before = len(terminal.raw)
    terminal.type(line + "\r")
    end = terminal.wait_for(until, after=before)
    return terminal.raw[before:end]


def test_an_answer_is_written_and_the_conversation_remembered(
    talking: tuple[Terminal, Server, Path],
) -> None:
    terminal, server, _ = talking
    assert "word word word" in say(terminal, "first question")
    say(terminal, "second question")
    roles = [message["role"] for message in server.asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert "forgotten" in say(terminal, "/reset")
    say(terminal, "third question")
    assert len(server.asked[-1]["messages"]) == 1


def test_what_a_terminal_would_obey_is_replaced(talking: tuple[Terminal, Server, Path]) -> None:
    terminal, _, _ = talking
    came = say(terminal, "escape")
    assert "a\ufffd]0;title\ufffdb\ufffd31m\ufffdc\ufffd" in came
    assert "\x1b]" not in came
    assert "\x9b" not in came
    assert "\u202e" not in came


def test_ctrl_c_stops_the_answer_and_not_the_program(
    talking: tuple[Terminal, Server, Path],
) -> None:
    terminal, server, _ = talking
    say(terminal, "forever", until="on and on on and on")
    before = len(terminal.raw)
    terminal.type("\x03")
    terminal.wait_for("stopped", after=before)
    terminal.wait_for(PROMPT, after=before)
    say(terminal, "and now")
    *_, stopped, last = server.asked[-1]["messages"]
    assert stopped["role"] == "assistant"
    assert stopped["content"].startswith("on and on")
    assert last["content"] == "and now"
    before = len(terminal.raw)
    terminal.type("half a line\x03")
    terminal.wait_for("Ctrl-D leaves", after=before)


def test_settings_and_the_system_message_go_along(talking: tuple[Terminal, Server, Path]) -> None:
    terminal, server, folder = talking
    say(terminal, "/reset")
    assert "temperature 0.2" in say(terminal, "/set temperature 0.2")
    assert "to be set" in say(terminal, "/set model two")
    assert "there is also two" in say(terminal, "/model")
    assert "the server has no three" in say(terminal, "/model three")
    say(terminal, "/model two")
    say(terminal, "/system be brief")
    say(terminal, "hello")
    asked = server.asked[-1]
    assert (asked["model"], asked["temperature"]) == ("two", 0.2)
    assert asked["messages"][0] == {"role": "system", "content": "be brief"}
    assert "saved" in say(terminal, "/save talk.json")
    saved = json.loads((folder / "talk.json").read_text())
    assert saved["messages"][:2] == asked["messages"]
    assert saved["messages"][2]["role"] == "assistant"
    assert "File exists" in say(terminal, "/save talk.json")
    assert "nothing is set" in say(terminal, "/unset temperature")
    assert "there is no /foo" in say(terminal, "/foo")
    help_text = say(terminal, "/help")
    assert all(command in help_text for command in chat_session.COMMANDS)


def test_a_message_may_have_several_lines(talking: tuple[Terminal, Server, Path]) -> None:
    terminal, server, _ = talking
    say(terminal, '"""first', until="\n. ")
    say(terminal, 'second"""')
    assert server.asked[-1]["messages"][-1]["content"] == "first\nsecond"
    say(terminal, "first \\", until="\n. ")
    say(terminal, "second")
    assert server.asked[-1]["messages"][-1]["content"] == "first \nsecond"


def test_a_refusal_is_told_and_the_question_forgotten(
    talking: tuple[Terminal, Server, Path],
) -> None:
    terminal, server, _ = talking
    say(terminal, "/reset")
    server.busy = True
    assert "status 429: too many" in say(terminal, "hello")
    server.busy = False
    say(terminal, "again")
    assert [m["content"] for m in server.asked[-1]["messages"][-1:]] == ["again"]
    assert [m["role"] for m in server.asked[-1]["messages"]].count("user") == 1


def test_ctrl_d_leaves_and_lines_are_kept_for_their_owner_only(
    talking: tuple[Terminal, Server, Path],
) -> None:
    terminal, _, folder = talking
    terminal.type("\x04")
    assert terminal.wait() == 0
    kept = folder / "cache" / "chat_history"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert "first question" in kept.read_text()


def test_text_stays_as_it_is_where_it_does_no_harm() -> None:
    text = "é 日本 👩\u200d💻 \u00ad\u200b a\tb\n"
    assert clean(text) == text
    assert clean("a\r\nb\rc\x7f\u2066") == "a\nb\ufffdc\ufffd\ufffd"
