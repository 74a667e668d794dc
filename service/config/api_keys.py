"""The keys clients must show: from the environment or from a file of their own, never printed.

One key is written `KEY` or `NAME: KEY`, with at least one space after the colon (a key has none,
so no key can be taken for a name). A key without a name is called key-1, key-2, ... by its place
among those without one. One name may have several keys, so that a key can be replaced while both
work.
"""

import re
import stat
from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr

from service.config.api_key import NAME_PATTERN
from service.config.api_key import ApiKey
from service.config.origin import Origin
from service.config.yaml_file import MAX_BYTES
from service.errors import ConfigError
from service.errors import Problem

MAX_KEYS = 10_000
DEFAULT = "default"
"""The entry of `server.key_limits` for keys without one: no key may be called so."""
KEPT_NAMES = re.compile(rf"{DEFAULT}|key-[0-9]+")


def from_variable(text: str) -> tuple[ApiKey, ...]:
    """Keys separated by commas. Raises ConfigError, which says no more of a key than its number."""
    return _keys(enumerate(text.split(","), 1), "env MOORAGE_API_KEYS", "key {}")


def from_file(path: Path, origin: Origin) -> tuple[tuple[ApiKey, ...], tuple[str, ...]]:
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
) -> tuple[ApiKey, ...]:
    names: dict[str, str] = {}  # key -> name
    unnamed = 0
    for number, text in numbered:
        name, colon, key = text.strip().partition(": ")
        if not colon:
            name, key = "", name
        key = key.strip()
        if not key:
            continue
        said = _wrong(name if colon else None, key)
        if said is None and colon and names.get(key, name) != name:
            said = f"has the key of {names[key]} again, under another name"
        if said is not None:
            said = f"{place.format(number)} {said}"
            raise _refused(origin, f"{where}: {said}") if origin else _problem(where, said)
        if not colon and key not in names:
            unnamed += 1
            name = f"key-{unnamed}"
        names.setdefault(key, name)
    if not names or len(names) > MAX_KEYS:
        said = "has no key in it" if not names else f"has more than {MAX_KEYS:,} keys"
        raise _refused(origin, f"{where} {said}") if origin else _problem(where, said)
    return tuple(ApiKey(name, SecretStr(key)) for key, name in names.items())


def _wrong(name: str | None, key: str) -> str | None:
    """What is wrong with one key and its name, without either of them: they might be swapped."""
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        return "has a name that is not up to 64 letters, digits, '.', '_' and '-'"
    if name is not None and KEPT_NAMES.fullmatch(name):
        return "has a name that is kept for keys without one; choose another"
    if name is None and key.endswith(":"):
        return "has a name without a key"
    if not key.isascii() or not key.isprintable() or " " in key:
        return "has a space or a character that is not plain ASCII"
    return None


def _problem(where: str, message: str) -> ConfigError:
    return ConfigError([Problem(where, "", message)])


def _refused(origin: Origin, message: str) -> ConfigError:
    key = "server.api_keys_file"
    return ConfigError([Problem(origin.where(), key, message, origin.source, origin.column)])
