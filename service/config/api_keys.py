"""The keys clients must show: from the environment or from a file of their own, never printed."""

import stat
from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr

from service.config.origin import Origin
from service.config.yaml_file import MAX_BYTES
from service.errors import ConfigError
from service.errors import Problem

MAX_KEYS = 10_000


def from_variable(text: str) -> tuple[SecretStr, ...]:
    """Keys separated by commas. Raises ConfigError, which says no more of a key than its number."""
    return _keys(enumerate(text.split(","), 1), "env MOORAGE_API_KEYS", "key {}")


def from_file(path: Path, origin: Origin) -> tuple[tuple[SecretStr, ...], tuple[str, ...]]:
    """One key a line; empty lines and lines that begin with # are skipped. Keys and notices.

    `origin` is where the path was written. Raises ConfigError when the file cannot be read or
    holds no key: an open server must not be the answer to a missing file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
            mode = stat.S_IMODE(path.stat().st_mode)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no text file"
        raise _refused(origin, f"{path} cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise _refused(origin, f"{path} is larger than 1 MiB")
    lines = ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()[:1] != "#")
    keys = _keys(lines, str(path), "line {}", origin)
    if mode & stat.S_IROTH:
        return keys, (f"{path} can be read by every user of this machine: chmod 600 {path}",)
    return keys, ()


def _keys(
    numbered: Iterable[tuple[int, str]], where: str, place: str, origin: Origin | None = None
) -> tuple[SecretStr, ...]:
    keys: dict[str, None] = {}
    for number, text in numbered:
        key = text.strip()
        if not key:
            continue
        if not key.isascii() or not key.isprintable() or " " in key:
            said = f"{place.format(number)} has a space or a character that is not plain ASCII"
            raise _refused(origin, f"{where}: {said}") if origin else _problem(where, said)
        keys[key] = None
    if not keys or len(keys) > MAX_KEYS:
        said = "has no key in it" if not keys else f"has more than {MAX_KEYS:,} keys"
        raise _refused(origin, f"{where} {said}") if origin else _problem(where, said)
    return tuple(SecretStr(key) for key in keys)


def _problem(where: str, message: str) -> ConfigError:
    return ConfigError([Problem(where, "", message)])


def _refused(origin: Origin, message: str) -> ConfigError:
    key = "server.api_keys_file"
    return ConfigError([Problem(origin.where(), key, message, origin.source, origin.column)])
