"""What a function looks at beside its arguments, and on which line of its author's files.

A profile function sees every call; the caller tells whether it was the author's own line or
something deep inside a library that reads the environment for its own ends.
"""

import os
import sys
import sysconfig
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

_SERVICE = str(Path(__file__).resolve().parents[1])
# what a plan in another environment keeps: without these Python does not run
_KEPT = ("PATH", "HOME", "TMPDIR", "LD_", "PYTHON", "CUDA", "NVIDIA")
# what Python's own library does, it does for its caller
_STDLIB = ("<frozen", sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True)
class Look:
    """One glance: at what ("the variable MY_DEVICE"), and where ("mine.py:12")."""

    what: str
    where: str


@dataclass
class Watch:
    """Records looks while it is set as the profile function of this thread."""

    author: Callable[[str], bool]
    looks: list[Look] = field(default_factory=list)
    loads: list[Look] = field(default_factory=list)
    _functions: dict[Any, str] = field(default_factory=dict)
    _loaders: dict[Any, str] = field(default_factory=dict)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            self._builtin(frame, argument)
        elif event == "call":
            self._python(frame)

    def _python(self, frame: FrameType) -> None:
        code = frame.f_code
        what = self._functions.get(code)
        if what is not None and (where := self._asked(frame.f_back)):
            if what == "the environment" and "key" in frame.f_locals:
                what = f"the variable {frame.f_locals['key']}"
            self.looks.append(Look(what, where))
        loader = self._loaders.get(code)
        if loader is not None and (where := self._behind(frame.f_back)):
            self.loads.append(Look(loader, where))

    def _builtin(self, frame: FrameType, argument: Any) -> None:
        try:
            what = self._functions.get(argument)
        except TypeError:  # a bound method of something that cannot be hashed
            return
        if what is not None and (where := self._asked(frame)):
            self.looks.append(Look(what, where))

    def _asked(self, frame: FrameType | None) -> str | None:
        """The author's line if it is the nearest one outside Python's own library."""
        while frame is not None and _is_stdlib(frame.f_code.co_filename):
            frame = frame.f_back
        return self._line(frame) if frame is not None else None

    def _behind(self, frame: FrameType | None) -> str | None:
        """The author's line if he called it through whatever library, but not through ours."""
        while frame is not None and not frame.f_code.co_filename.startswith(_SERVICE):
            line = self._line(frame)
            if line is not None:
                return line
            frame = frame.f_back
        return None

    def _line(self, frame: FrameType) -> str | None:
        file = frame.f_code.co_filename
        return f"{Path(file).name}:{frame.f_lineno}" if self.author(file) else None


def _is_stdlib(file: str) -> bool:
    """Installed packages may lie below Python's own library; they are not part of it."""
    installed = "site-packages" in file or "dist-packages" in file
    return file.startswith(_STDLIB) and not installed


@contextmanager
def watched(author: Callable[[str], bool]) -> Iterator[Watch]:
    """Watch this thread. author: whether a file is the author's. Imports torch."""
    watch = Watch(author, _functions=_glances(), _loaders=_loads())
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield watch
    finally:
        sys.setprofile(before)


def _glances() -> dict[Any, str]:
    """Functions that tell about the world, by code or as builtins."""
    import psutil
    import torch

    from service.placement import hardware

    environment = type(os.environ)
    accelerators = ("is_available", "device_count", "mem_get_info", "get_device_properties")
    return {
        environment.__getitem__.__code__: "the environment",
        environment.__iter__.__code__: "the environment",
        **{getattr(torch.cuda, name).__code__: "the GPUs" for name in accelerators},
        psutil.virtual_memory.__code__: "the memory",
        hardware.detect.__code__: "the machine",
        time.time: "the clock",
        time.time_ns: "the clock",
        time.monotonic: "the clock",
        time.perf_counter: "the clock",
        datetime.now: "the clock",
        os.getcwd: "the current folder",
        os.cpu_count: "the processor",
    }


def _loads() -> dict[Any, str]:
    """Functions that read weights."""
    import safetensors.torch
    import torch
    from transformers import PreTrainedModel

    return {
        safetensors.torch.load_file.__code__: "safetensors.torch.load_file",
        torch.load.__code__: "torch.load",
        PreTrainedModel.from_pretrained.__func__.__code__: "from_pretrained",
    }


@contextmanager
def elsewhere(workspace: Path) -> Iterator[None]:
    """Another folder, a bare environment, and a clock that is a year ahead."""
    folder, environment, clock = Path.cwd(), dict(os.environ), time.time
    os.chdir(workspace)
    for name in environment:
        if not name.startswith(_KEPT):
            del os.environ[name]
    vars(time)["time"] = lambda: clock() + 365 * 86_400
    try:
        yield
    finally:
        vars(time)["time"] = clock
        os.environ.update(environment)
        os.chdir(folder)


def by_value(value: Any) -> Any:
    """Something that compares by value, also for settings of a quantiser, which do not."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: by_value(item) for key, item in value.items()}
    return value
