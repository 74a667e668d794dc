"""`python -m tests.docs.following FILE serve ...`: the command `moorage`, which writes down each
call of a function that docs/architecture.md names: who, and what, as in
`load service.placement.loading.load`.
"""

import os
import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")


def told(title: str) -> list[str]:
    """The rows of the table under a heading that begins so, each as a line of FILE."""
    section = PAGE.split(f"\n## {title}")[1].split("\n## ")[0]
    return [" ".join(row) for row in re.findall(r"^\| (\w+) \|.*?\| `([\w.]+)`", section, re.M)]


def follow(file: Path) -> None:
    """From now on, in this process, its threads and those it forks."""
    wanted = {line.split()[1] for title in ("Flow 1", "Flow 2") for line in told(title)}
    # the last name only: cheap enough to be asked at every call there is
    names = {name.rpartition(".")[2] for name in wanted}
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    master = os.getpid()

    def entered(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or frame.f_code.co_name not in names:
            return
        name = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"
        if name in wanted:
            os.write(output, f"{who(master)} {name}\n".encode())

    threading.setprofile(entered)
    sys.setprofile(entered)


def who(master: int) -> str:
    if os.getpid() == master:
        return "master"
    thread = threading.current_thread()
    if thread is threading.main_thread():
        return "worker"
    return "HTTP" if thread.name.startswith("ThreadPoolExecutor") else thread.name


if __name__ == "__main__":
    follow(Path(sys.argv.pop(1)))
    from service.cli.main import main

    main()
