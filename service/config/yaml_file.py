"""YAML text -> plain values, each with its place in the text.

The parser is ruamel.yaml's; the values are built here from its events, because every mistake must
name its line and column, duplicate keys must all be found, and a hostile file must stay cheap.
Scalars follow the core schema of YAML 1.2: `yes`, `on` and dates are text, 010 is ten.
"""

import re
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.events import DocumentStartEvent
from ruamel.yaml.events import Event
from ruamel.yaml.events import MappingEndEvent
from ruamel.yaml.events import MappingStartEvent
from ruamel.yaml.events import NodeEvent
from ruamel.yaml.events import ScalarEvent
from ruamel.yaml.events import SequenceEndEvent
from ruamel.yaml.events import SequenceStartEvent
from ruamel.yaml.events import StreamEndEvent
from ruamel.yaml.events import StreamStartEvent
from ruamel.yaml.reader import ReaderError

from service.config.origin import Origin
from service.errors import ConfigError
from service.errors import Problem

MAX_BYTES = 2**20
MAX_NODES = 10_000
MAX_DEPTH = 32
MAX_DIGITS = 40
SHOWN_COLUMNS = 160

Key = tuple[str | int, ...]
"""Where a value is: ("deployments", "rig", "fallback", 0)."""

LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
NULL = re.compile(r"~|null|Null|NULL|")
TRUE = re.compile(r"true|True|TRUE")
FALSE = re.compile(r"false|False|FALSE")
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
UNUSABLE = re.compile("[\0\ud800-\udfff]")
SECRET_LINE = re.compile(
    r"(?i)(api[_-]?keys?|access[_-]?key|token|secret|password|passwd)[\"']?\s*[:=]"
    r"|\b(hf_[a-z0-9]{20}|sk-[a-z0-9_-]{16})"
)


@dataclass(frozen=True)
class Spot:
    """A place in the text. Both count from 1, in characters."""

    line: int
    column: int


@dataclass(frozen=True)
class Document:
    """Plain values (dict, list, str, int, float, bool, None) and where each stands.

    `name` is the file as the operator wrote it. A mapping's entry stands where its key is, a list's
    item where it begins. `problems` are mistakes of the YAML itself that did not stop the reading.
    """

    name: str
    lines: tuple[str, ...]
    value: Any
    spots: Mapping[Key, Spot]
    problems: tuple[Problem, ...] = ()

    def spot(self, key: Key) -> Spot:
        """Where `key` stands, or the nearest block around it."""
        while key not in self.spots and key:
            key = key[:-1]
        return self.spots.get(key, Spot(1, 1))

    def origin(self, key: Key) -> Origin:
        spot = self.spot(key)
        return Origin("file", self.name, spot.line, spot.column, self._line(spot))

    def problem(self, key: Key, message: str, *, show: bool = True) -> Problem:
        """A mistake at `key`. With show=False the line of the file is not quoted."""
        spot = self.spot(key)
        source = self._line(spot) if show else None
        return _problem(self.name, spot, dotted(key), message, source)

    def _line(self, spot: Spot) -> str | None:
        return self.lines[spot.line - 1] if spot.line <= len(self.lines) else None


def dotted(key: Key) -> str:
    """("deployments", "rig", "fallback", 0) -> "deployments.rig.fallback[0]"."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part if part.isprintable() else repr(part)}"
    return text.removeprefix(".")


def read(path: Path, name: str) -> Document:
    """The YAML file at `path`; messages call it `name`.

    Raises ConfigError when it cannot be read, is larger than 1 MiB, or is not YAML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        said = "no such file; `moorage config init` writes a starter"
        raise ConfigError([Problem(name, "", said)]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError([Problem(name, "", f"cannot be read: {reason}")]) from None
    if len(data) > MAX_BYTES:
        raise ConfigError([Problem(name, "", "is larger than 1 MiB; that is no config file")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(f"{name}:{line}", "", "is not UTF-8 text")]) from None
    return parse(text, name)


def parse(text: str, name: str) -> Document:
    """The one YAML document in `text`; an empty one has the value None.

    Raises ConfigError, with line and column, when it is not YAML or too large to be honest.
    """
    lines = tuple(LINE_BREAK.split(text))
    builder = _Builder(name, lines)
    try:
        root = builder.build(iter(YAML(typ="safe", pure=True).parse(text)))
    except ReaderError as error:
        spot = _spot_of_offset(lines, error.position)
        raise builder.refuse(spot, "a control character; remove it") from None
    except MarkedYAMLError as error:
        spot, message = _explain(error, lines)
        raise builder.refuse(spot, message) from None
    except YAMLError as error:
        raise builder.refuse(builder.reached, f"not valid YAML: {error}") from None
    except (ValueError, OverflowError):  # ruamel's chr() of an escape such as "\\UFFFFFFFF"
        said = "not valid YAML: an escape that is no character, here or below"
        raise builder.refuse(builder.reached, said) from None
    spots: dict[Key, Spot] = {}
    value = None if root is None else _flatten(root, (), spots)
    return Document(name, lines, value, spots, tuple(builder.problems))


def parse_value(text: str) -> Any:
    """One value written as YAML, as in an environment variable or after --set.

    Raises ValueError saying what is wrong.
    """
    if len(text) > MAX_BYTES // 16:
        raise ValueError("is longer than 64 KiB")
    try:
        document = parse(text, "")
    except ConfigError as error:
        raise ValueError(error.problems[0].message) from None
    if document.problems:
        raise ValueError(document.problems[0].message)
    return document.value


# --- events -> nodes -> values


@dataclass
class _Node:
    """A value with its places. `size` counts its nodes with aliases written out."""

    spot: Spot
    scalar: Any = None
    entries: dict[str, tuple[Spot, "_Node"]] | None = None
    items: "list[_Node] | None" = None
    size: int = 1


@dataclass
class _Builder:
    name: str
    lines: tuple[str, ...]
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, _Node] = field(default_factory=dict)
    nodes: int = 0
    reached: Spot = Spot(1, 1)

    def refuse(self, spot: Spot, message: str, key: Key = ()) -> ConfigError:
        return ConfigError([*self.problems, self._at(spot, message, key)])

    def note(self, spot: Spot, message: str, key: Key) -> None:
        self.problems.append(self._at(spot, message, key))

    def build(self, events: Iterator[Event]) -> _Node | None:
        root: _Node | None = None
        documents = 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.refuse(_spot(event), "a second document begins here; keep one")
                if event.version not in (None, (1, 2)):
                    raise self.refuse(Spot(1, 1), "this file is read as YAML 1.2; remove %YAML")
            elif isinstance(event, NodeEvent):
                root = self._node(event, events, (), 0)
            elif isinstance(event, (StreamStartEvent, StreamEndEvent)):
                continue
        return root

    def _node(self, event: Event, events: Iterator[Event], key: Key, depth: int) -> _Node:
        self.reached = spot = _spot(event)
        if isinstance(event, AliasEvent):
            return self._alias(event, spot, key)
        self._count(1, spot)
        if depth > MAX_DEPTH:
            raise self.refuse(spot, f"nested more than {MAX_DEPTH} deep")
        if getattr(event, "ctag", None) is not None:
            self.note(spot, "tags are not supported; quote what should be text", key)
        if isinstance(event, MappingStartEvent):
            node = self._mapping(spot, events, key, depth)
        elif isinstance(event, SequenceStartEvent):
            node = self._sequence(spot, events, key, depth)
        elif isinstance(event, ScalarEvent):
            node = _Node(spot, self._scalar(event, spot, key))
        else:
            raise self.refuse(spot, f"not valid YAML: unexpected {type(event).__name__}", key)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, event: AliasEvent, spot: Spot, key: Key) -> _Node:
        node = self.anchors.get(event.anchor)
        if node is None:
            self.note(spot, f"*{event.anchor}: no anchor &{event.anchor} before it", key)
            return _Node(spot)
        self._count(node.size, spot)
        return node

    def _mapping(self, spot: Spot, events: Iterator[Event], key: Key, depth: int) -> _Node:
        entries: dict[str, tuple[Spot, _Node]] = {}
        size = 1
        for event in events:
            if isinstance(event, MappingEndEvent):
                break
            at = _spot(event)
            name = self._key(event, events, key, depth)
            value = self._node(next(events), events, (*key, name or "?"), depth + 1)
            size += 1 + value.size
            if name is None:
                continue
            if name in entries:
                first = entries[name][0].line
                self.note(at, f"duplicate key; it is on line {first} already", (*key, name))
                continue
            entries[name] = (at, value)
        return _Node(spot, entries=entries, size=size)

    def _key(self, event: Event, events: Iterator[Event], key: Key, depth: int) -> str | None:
        """The text of a key, or None after noting why it cannot be one."""
        spot = _spot(event)
        node = self._node(event, events, key, depth + 1)
        if isinstance(event, ScalarEvent) and event.style is None and event.value == "<<":
            self.note(spot, "merge keys (<<) are not supported; put shared values in defaults", key)
            return None
        if isinstance(node.scalar, str) and node.entries is None and node.items is None:
            return node.scalar
        block = node.entries is not None or node.items is not None
        what = "a block" if block else describe(node.scalar)
        self.note(spot, f"{what} cannot be a key; keys are text, quoted if need be", key)
        return None

    def _sequence(self, spot: Spot, events: Iterator[Event], key: Key, depth: int) -> _Node:
        items: list[_Node] = []
        for event in events:
            if isinstance(event, SequenceEndEvent):
                break
            items.append(self._node(event, events, (*key, len(items)), depth + 1))
        return _Node(spot, items=items, size=1 + sum(item.size for item in items))

    def _scalar(self, event: ScalarEvent, spot: Spot, key: Key) -> Any:
        text: str = event.value
        if UNUSABLE.search(text):
            self.note(spot, "a zero byte or half a surrogate pair; remove it", key)
            return ""
        if event.style is not None:
            return text
        if NULL.fullmatch(text):
            return None
        if TRUE.fullmatch(text) or FALSE.fullmatch(text):
            return TRUE.fullmatch(text) is not None
        if INTEGER.fullmatch(text):
            return self._integer(text, spot, key)
        if FLOAT.fullmatch(text):
            number = float(text)
            if abs(number) != float("inf"):
                return number
        elif not NOT_FINITE.fullmatch(text):
            return text
        self.note(spot, f"{text[:MAX_DIGITS]} is not a finite number", key)
        return 0

    def _integer(self, text: str, spot: Spot, key: Key) -> int:
        if len(text) > MAX_DIGITS:
            self.note(
                spot, f"a number of more than {MAX_DIGITS} digits; quote it if it is text", key
            )
            return 0
        if text.startswith("0o"):
            return int(text[2:], 8)
        return int(text, 16) if text.startswith("0x") else int(text)

    def _count(self, nodes: int, spot: Spot) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise self.refuse(spot, f"more than {MAX_NODES:,} values, aliases written out")

    def _at(self, spot: Spot, message: str, key: Key) -> Problem:
        source = self.lines[spot.line - 1] if spot.line <= len(self.lines) else None
        return _problem(self.name, spot, dotted(key), message, source)


def _flatten(node: _Node, key: Key, spots: dict[Key, Spot]) -> Any:
    """The plain value of a node; the place of each of its parts goes to `spots`."""
    spots.setdefault(key, node.spot)
    if node.entries is not None:
        mapping: dict[str, Any] = {}
        for name, (spot, value) in node.entries.items():
            spots[(*key, name)] = spot
            mapping[name] = _flatten(value, (*key, name), spots)
        return mapping
    if node.items is not None:
        return [_flatten(item, (*key, index), spots) for index, item in enumerate(node.items)]
    return node.scalar


# --- words


def describe(value: Any) -> str:
    """A value as the operator would recognise it, short enough for a message."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def _problem(name: str, spot: Spot, key: str, message: str, source: str | None) -> Problem:
    where = f"{name}:{spot.line}:{spot.column}"
    if source is None or SECRET_LINE.search(source):
        return Problem(where, key, message)
    column = spot.column
    if len(source) > SHOWN_COLUMNS:
        start = max(0, min(column - SHOWN_COLUMNS // 2, len(source) - SHOWN_COLUMNS))
        source, column = source[start : start + SHOWN_COLUMNS], column - start
    shown = "".join(c if c.isprintable() else " " for c in source)  # a terminal obeys the others
    return Problem(where, key, message, shown, min(column, len(source) + 1))


def _spot(event: Event) -> Spot:
    return Spot(event.start_mark.line + 1, event.start_mark.column + 1)


def _spot_of_offset(lines: tuple[str, ...], offset: int) -> Spot:
    for number, line in enumerate(lines, 1):
        if offset <= len(line):
            return Spot(number, offset + 1)
        offset -= len(line) + 1
    return Spot(max(1, len(lines)), 1)


def _explain(error: MarkedYAMLError, lines: tuple[str, ...]) -> tuple[Spot, str]:
    mark = error.problem_mark or error.context_mark
    problem = str(error.problem or error.context or "cannot be read")
    at_end = mark is not None and mark.line >= len(lines) - 1 and "end of" in problem
    if at_end and error.context_mark is not None:
        mark = error.context_mark  # where the quote or bracket was opened says more than the end
    spot = Spot(1, 1) if mark is None else Spot(mark.line + 1, mark.column + 1)
    if "'\\t'" in problem:
        return spot, "a tab; indent with spaces"
    if problem == "mapping values are not allowed here":
        return spot, "not valid YAML: a second ':'; quote text that contains one, or fix the indent"
    context = f" {error.context}" if error.context and error.context != problem else ""
    return spot, f"not valid YAML: {problem}{context}"
