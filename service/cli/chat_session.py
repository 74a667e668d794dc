"""The conversation of `moorage chat` with a person at a terminal."""

import contextlib
import json
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path

from service.cli import terminal
from service.cli.chat import Talk
from service.cli.cleaning import clean
from service.errors import NoAnswer

PROMPT, MORE = "> ", ". "
BLOCK = '"""'
LINES_KEPT = 1000
HELP = """\
/help               this list
/system [TEXT]      the system message: show it, or say another one
/set [KEY VALUE]    fields of the request, such as temperature 0.2: show, or set one
/unset KEY          leave a field out again
/model [NAME]       which model is asked: show, or another one of the server's
/reset              forget the conversation; system message and settings stay
/save FILE          the conversation as JSON, as a request that could be sent again
/exit               leave; so does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one;
so do all lines between one \"\"\" and the next."""
# said of an answer that did not end by itself
ENDS = {
    "length": "the answer was cut: max_tokens, or the context is full (/set max_tokens N, /reset)",
    "content_filter": "the server withheld the rest",
}


def run(talk: Talk, history: Path) -> None:
    """Until Ctrl-D. history: where lines that were typed are kept for the arrow keys."""
    with _lines_kept(history):
        _note(f"{talk.model} at {talk.server.url}   /help says what else can be written")
        while True:
            try:
                text = read(input)
            except EOFError:
                terminal.say("")
                return
            except KeyboardInterrupt:
                terminal.say("")
                _note("Ctrl-D leaves")
                continue
            if text.startswith("/") and not text.startswith("//"):
                if not obey(talk, text):
                    return
            elif text:
                answer(talk, text.removeprefix("/") if text.startswith("//") else text)


def read(ask: Callable[[str], str]) -> str:
    """One message, which may have several lines. Raises what `ask` raises: EOFError at the end."""
    line = ask(PROMPT)
    if line.strip().startswith(BLOCK):
        lines = [line.strip().removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(ask(MORE))
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines).strip()
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(ask(MORE))
    return "\n".join(lines).strip()


def answer(talk: Talk, question: str) -> None:
    """Ask, and write the answer as it comes. Ctrl-C stops it."""
    console = terminal.console()
    pieces = talk.ask(question)
    try:
        with contextlib.closing(pieces):
            for kind, text in pieces:
                style = "bright_black" if kind == "thought" else None
                console.out(clean(text), end="", style=style, highlight=False)
        terminal.say("")
        if said := ENDS.get(talk.finish_reason or ""):
            _note(said)
    except KeyboardInterrupt:
        terminal.say("")
        _note("stopped")
    except NoAnswer as error:
        terminal.say("")
        _complain(clean(error.one_line()))


def obey(talk: Talk, line: str) -> bool:
    """A line that begins with a slash. Returns whether the conversation goes on."""
    word, _, rest = line.partition(" ")
    if word in ("/exit", "/quit", "/bye"):
        return False
    command = COMMANDS.get(word)
    if command is None:
        _complain(f"there is no {clean(word)}; /help lists what there is, // begins a text with /")
        return True
    try:
        command(talk, rest.strip())
    except (ValueError, OSError, NoAnswer) as error:
        _complain(clean(str(error)))
    return True


def _help(talk: Talk, rest: str) -> None:
    terminal.say(HELP, ((r"(?m)^/\w+", "bold"),))


def _system(talk: Talk, rest: str) -> None:
    if rest:
        talk.system = rest
    _note(f"system: {clean(talk.system)}" if talk.system else "there is no system message")


def _set(talk: Talk, rest: str) -> None:
    key, _, value = rest.partition(" ")
    if key and not value.strip():
        raise ValueError(f"say what {key} becomes, for example /set temperature 0.2")
    if key:
        talk.set(key, value.strip())
    shown = (f"{name} {json.dumps(said)}" for name, said in talk.settings.items())
    _note(", ".join(shown) or "nothing is set: the server's own settings")


def _unset(talk: Talk, rest: str) -> None:
    if rest not in talk.settings:
        raise ValueError(f"{rest or 'nothing'} is not set")
    del talk.settings[rest]
    _set(talk, "")


def _model(talk: Talk, rest: str) -> None:
    listed = talk.server.models()
    if rest and rest not in listed:
        raise ValueError(f"the server has no {rest}; it has {', '.join(listed)}")
    talk.model = rest or talk.model
    others = [name for name in listed if name != talk.model]
    _note(clean(talk.model + (f"; there is also {', '.join(others)}" if others else "")))


def _reset(talk: Talk, rest: str) -> None:
    talk.messages.clear()
    _note("forgotten")


def _save(talk: Talk, rest: str) -> None:
    if not rest:
        raise ValueError("say where, for example /save talk.json")
    path = Path(rest).expanduser()
    with path.open("x", encoding="utf-8") as file:  # never over a file that is there
        file.write(json.dumps(talk.body(), indent=2, ensure_ascii=False) + "\n")
    _note(f"saved {path}")


COMMANDS: Mapping[str, Callable[[Talk, str], None]] = {
    "/help": _help,
    "/system": _system,
    "/set": _set,
    "/unset": _unset,
    "/model": _model,
    "/reset": _reset,
    "/save": _save,
}


def _note(text: str) -> None:
    terminal.say(text, ((r"(?s).+", "bright_black"),))


def _complain(text: str) -> None:
    terminal.say(text, ((r"(?s).+", "red"),), stderr=True)


@contextlib.contextmanager
def _lines_kept(path: Path) -> Iterator[None]:
    """Line editing, with the lines of earlier conversations, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(LINES_KEPT)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a home that cannot be written is no reason to fail
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
