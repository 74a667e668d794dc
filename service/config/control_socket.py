"""The Unix socket on which the running server takes commands from its own user.

Its folder may be entered by that user only, it has mode 0600, and the kernel says who is on the
other end. One connection carries one request: a line of JSON, answered by lines of JSON. There is
no way to it through the serving port.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.config.address import LONGEST_SOCKET_PATH
from service.errors import ControlFailed

log = logging.getLogger(__name__)

MOST_REQUEST = 65_536
"""Bytes of one request."""
PATIENCE_S = 10.0
"""How long either end waits for the other's request, or for what it sent to be taken."""

Obey = Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]]


def default_path(bind: str, env: Mapping[str, str]) -> Path:
    """Where a server at this address listens: below $XDG_RUNTIME_DIR, else below the folder for
    temporary files, in a folder with the user's number.
    """
    runtime = Path(env.get("XDG_RUNTIME_DIR", "").strip() or "-")
    if runtime.is_absolute():
        folder = runtime / "moorage"
    else:
        folder = Path(tempfile.gettempdir()) / f"moorage-{os.geteuid()}"
    if bind.startswith("unix:"):
        name = hashlib.sha256(bind.encode()).hexdigest()[:16]
    else:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", bind).strip("-")
    return folder / f"{name}.sock"


class Listener:
    """Listens until the process ends, or `close`."""

    def __init__(self, path: Path, obey: Obey) -> None:
        """Make the socket, and its folder if it is not there; a socket that nobody listens on any
        more is replaced. obey: gets a request; what it yields is sent. Raises ControlFailed.
        """
        self._path = path
        self._obey = obey
        _check_length(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_folder(path.parent)
            _clear(path)
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._socket.listen(4)
        except OSError as error:
            raise ControlFailed(f"the control socket {path} cannot be made: {error}") from None
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def close(self) -> None:
        """Remove it."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                log.error("the control socket takes no more commands: %s", error)
                return
            threading.Thread(
                target=self._answer, args=(connection,), name="control", daemon=True
            ).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # who has left is told nothing
            connection.settimeout(PATIENCE_S)
            if _peer(connection) not in (os.geteuid(), None):
                return
            with connection.makefile("rb") as lines:
                line = lines.readline(MOST_REQUEST)
            try:
                request = json.loads(line)
            except (ValueError, RecursionError):
                request = None
            for message in self._obey(request if isinstance(request, dict) else {}):
                connection.sendall(json.dumps(message).encode() + b"\n")


def ask(path: Path, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Send a request and yield what is told of it, to the end.

    Raises ControlFailed when nobody listens, when the socket or its folder is not only ours, or
    when the server ends before it has answered.
    """
    _check_length(path)
    if not os.path.lexists(path):
        raise _nobody(path)
    try:
        _check_folder(path.parent)
        _check_socket(path)
    except FileNotFoundError:  # its server has just ended
        raise _nobody(path) from None
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        try:
            connection.connect(str(path))
        except OSError:
            raise _nobody(path) from None
        ended = False
        with (
            connection.makefile("rb") as lines,
            contextlib.suppress(ConnectionError, TimeoutError),
        ):
            connection.sendall(json.dumps(request).encode() + b"\n")
            connection.settimeout(None)  # a load takes its time; the end of the server ends this
            for line in lines:
                message: dict[str, Any] = json.loads(line)
                ended = "progress" not in message
                yield message
        if not ended:
            raise ControlFailed(
                "the server ended before it had answered",
                hint="its log says why; a fresh worker loads what was served before",
            )


def _nobody(path: Path) -> ControlFailed:
    return ControlFailed(
        f"no server listens on {path}",
        hint="name the config of the running server with --config, or its socket with --socket; "
        "its log says where it listens",
    )


def _check_length(path: Path) -> None:
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ControlFailed(
            f"the path of the control socket is longer than {LONGEST_SOCKET_PATH} bytes: {path}",
            hint="set server.control_socket to a shorter one",
        )


def _check_folder(folder: Path) -> None:
    """Raises ControlFailed unless only this user may enter the folder."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is no folder"
    elif found.st_uid != os.geteuid():
        wrong = f"belongs to user {found.st_uid}, and this is user {os.geteuid()}"
    elif found.st_mode & 0o077:
        wrong = f"has mode {stat.S_IMODE(found.st_mode):04o}, so that others may enter"
    else:
        return
    raise ControlFailed(
        f"the folder of the control socket, {folder}, {wrong}",
        hint="make it yours with mode 0700, or set server.control_socket to a path in another one",
    )


def _check_socket(path: Path) -> None:
    """Raises ControlFailed unless it is a socket that only this user may use."""
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode):
        wrong = "is no socket"
    elif found.st_uid != os.geteuid():
        wrong = f"belongs to user {found.st_uid}, and this is user {os.geteuid()}"
    elif found.st_mode & 0o177:
        wrong = f"has mode {stat.S_IMODE(found.st_mode):04o}, not 0600"
    else:
        return
    raise ControlFailed(f"the control socket {path} {wrong}", hint="run as the server's user")


def _clear(path: Path) -> None:
    """Remove what a server that has ended left behind."""
    if not os.path.lexists(path):
        return
    _check_socket(path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PATIENCE_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ControlFailed(
        f"another server listens on the control socket {path}",
        hint="set server.control_socket to a path of its own",
    )


def _peer(connection: socket.socket) -> int | None:
    """The user on the other end; None where the system does not say."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, size))
    return int(user)
