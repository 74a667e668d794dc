"""Renders chat templates, in a process of its own: see `service.text.templates`.

A script that imports nothing of ours. Requests and answers are frames: four bytes of length, then
JSON. It ends when its input does, however its parent ended.
"""

import importlib
import importlib.util
import json
import resource
import signal
import sys
import traceback
import types
from pathlib import Path
from typing import Any

LENGTH_BYTES = 4
SHOWN = 1000  # characters of what a template says when it refuses
TEMPLATES = "transformers.utils.chat_template_utils"


def main(memory_bytes: int, text_bytes: int) -> None:
    """Answer until there are no more requests.

    memory_bytes: what rendering may take beside what the process has at its start. text_bytes: of
    the longest answer.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    templates = load_templates()
    _limit(memory_bytes)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what anybody prints is no frame
    _send(answers, {"ready": True})
    while len(head := requests.read(LENGTH_BYTES)) == LENGTH_BYTES:
        request = json.loads(requests.read(int.from_bytes(head, "big")))
        _send(answers, _render(templates, request, text_bytes))


def load_templates() -> Any:
    """transformers' module of chat templates, alone where that is possible.

    Every server starts this process; the packages around the module take three times as long to
    import as the module does. They are left out by empty ones in their place. A version of
    transformers whose module needs them gets them.
    """
    before = set(sys.modules)
    try:
        _stand_in("transformers")
        _stand_in("transformers.utils")
        templates: Any = importlib.import_module(TEMPLATES)
        templates.render_jinja_template([[]], chat_template="")  # imports what it imports late
    except (ImportError, AttributeError):
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "transformers":
                del sys.modules[name]
        templates = importlib.import_module(TEMPLATES)
    return templates


def _stand_in(package: str) -> None:
    """An empty package whose modules are found where those of the real one are."""
    parent, _, last = package.rpartition(".")
    if parent:
        found = [str(Path(folder, last)) for folder in sys.modules[parent].__path__]
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(package)
        found = list(spec.submodule_search_locations)
    module = types.ModuleType(package)
    module.__path__ = found
    sys.modules[package] = module


def _limit(memory_bytes: int) -> None:
    """Bound this process's memory; on a system that does not say how much it has, in all."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            memory_bytes += int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        pass
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _render(templates: Any, request: dict[str, Any], text_bytes: int) -> dict[str, Any]:
    from jinja2 import TemplateError

    try:
        rendered, _ = templates.render_jinja_template(
            conversations=[request["messages"]],
            tools=request["tools"] or None,
            chat_template=request["template"],
            add_generation_prompt=request["prompt"],
            **request["special"],
        )
        text = str(rendered[0])
        if len(text) > text_bytes or len(text.encode()) > text_bytes:
            return {"endless": len(text)}
        return {"text": text}
    except TemplateError as error:
        return {"refused": str(error)[:SHOWN]}
    except (
        Exception
    ) as error:  # a template is a program from the model's folder; it raises anything
        return {"failed": type(error).__name__, "line": _line(error)}


def _line(error: BaseException) -> int:
    """The template's own line that raised; 0 if it was none."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno or 0 for frame in frames if frame.filename == "<template>"]
    return lines[-1] if lines else 0


def _send(answers: Any, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode()
    answers.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
    answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
