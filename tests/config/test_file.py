"""YAML text becomes values with places; whatever is wrong with it has a line and a column."""

from pathlib import Path

import pytest

from service.config import yaml_file
from service.errors import ConfigError


def problems(text: str) -> list[str]:
    try:
        document = yaml_file.parse(text, "m.yaml")
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return [str(problem) for problem in document.problems]


def test_values_are_those_of_yaml_1_2() -> None:
    text = "a: yes\nb: 2020-01-01\nc: 010\nd: 0x1F\ne: 0o17\nf: 1_000\ng: ~\nh: 1e3\ni: 'true'\nj:"
    assert yaml_file.parse(text, "m").value == {
        "a": "yes",
        "b": "2020-01-01",
        "c": 10,
        "d": 31,
        "e": 15,
        "f": "1_000",
        "g": None,
        "h": 1000.0,
        "i": "true",
        "j": None,
    }


def test_every_value_knows_its_place() -> None:
    document = yaml_file.parse("a:\n  b: {c: 1}\n  d:\n    - x\n    - e: 2\n", "m.yaml")
    places = {
        yaml_file.dotted(key): (spot.line, spot.column) for key, spot in document.spots.items()
    }
    assert places == {
        "": (1, 1),
        "a": (1, 1),
        "a.b": (2, 3),
        "a.b.c": (2, 7),
        "a.d": (3, 3),
        "a.d[0]": (4, 7),
        "a.d[1]": (5, 7),
        "a.d[1].e": (5, 7),
    }


def test_an_anchor_may_be_used_again() -> None:
    document = yaml_file.parse("a: &x {b: 1}\nc: *x\n", "m.yaml")
    assert document.value == {"a": {"b": 1}, "c": {"b": 1}}
    assert document.spot(("c", "b")).line == 1
    assert document.spot(("c",)).line == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "m.yaml:2:1: a: duplicate key; it is on line 1 already\n   a: 2\n   ^"),
        ("a:\n\tb: 1\n", "m.yaml:2:1: a tab; indent with spaces\n    b: 1\n   ^"),
        ("a: b: c\n", "m.yaml:1:5: not valid YAML: a second ':'"),
        ("a: 1\nb: 'x\nc: 2\n", "m.yaml:2:4: not valid YAML: found unexpected end of stream"),
        ("a: [1\nb: 2\n", "m.yaml:2:2: not valid YAML: expected ',' or ']'"),
        ("a: \x07\n", "m.yaml:1:4: a control character; remove it\n   a:  \n      ^"),
        ("a: 1\n---\nb: 1\n", "m.yaml:2:1: a second document begins here"),
        ("%YAML 1.1\n---\na: 1\n", "m.yaml:1:1: this file is read as YAML 1.2"),
        ("a: !!python/object:os.system x\n", "m.yaml:1:4: a: tags are not supported"),
        ("<<: {a: 1}\n", "m.yaml:1:1: merge keys (<<) are not supported"),
        ("b: &b {a: 1}\nc:\n  <<: *b\n", "m.yaml:3:3: c: merge keys (<<) are not supported"),
        ("a: {0: 1}\n", "m.yaml:1:5: a: 0 cannot be a key; keys are text, quoted if need be"),
        ("? [a]\n: 1\n", "m.yaml:1:3: a block cannot be a key"),
        ("a: *b\n", "m.yaml:1:4: a: *b: no anchor &b before it"),
        ("a: &a [*a]\n", "m.yaml:1:8: a[0]: *a: no anchor &a before it"),
        ("a: .nan\n", "m.yaml:1:4: a: .nan is not a finite number"),
        ("a: 1e999\n", "m.yaml:1:4: a: 1e999 is not a finite number"),
        ("a: " + "9" * 5000, "m.yaml:1:4: a: a number of more than 40 digits"),
        ('a: "\\ud800"\n', "m.yaml:1:4: a: a zero byte or half a surrogate pair"),
        ("[" * 5000, "m.yaml:1:34: nested more than 32 deep"),
    ],
)
def test_a_mistake_of_the_yaml_has_its_line_and_column(text: str, expected: str) -> None:
    assert [found for found in problems(text) if found.startswith(expected)], problems(text)


def test_every_duplicate_is_reported_not_only_the_first() -> None:
    assert len(problems("a: 1\na: 2\nb: {c: 1, c: 2, c: 3}\n")) == 3


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for name, before in zip("bcdefghi", "abcdefgh", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    assert "more than 10,000 values" in problems(bomb)[-1]


def test_a_long_line_is_cut_around_the_caret() -> None:
    text = "{" + ", ".join(f"key{number}: 1" for number in range(200)) + ", key150: 2}"
    _, line, caret = problems(text)[0].split("\n")
    assert len(line) < 170
    assert line[caret.index("^") :].startswith("key150: 2")


def test_a_line_with_a_secret_is_not_quoted() -> None:
    for line in ("api_keys: [abc", "password: 'abc", "x: {token: abc", "x: [hf_" + "a" * 30):
        assert "abc" not in "".join(problems(line))
        assert "aaa" not in "".join(problems(line))


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in problems('"a\\e[2J": 1\n"a\\e[2J": 2\n')[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: " + b"x" * 2**20, "m.yaml: is larger than 1 MiB"),
        (b"a: 1\nb: \xff\n", "m.yaml:2: is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_config_is_refused(folder: Path, content: bytes, expected: str) -> None:
    (folder / "m.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        yaml_file.read(Path("m.yaml"), "m.yaml")


def test_a_byte_order_mark_and_windows_line_ends_are_read(folder: Path) -> None:
    (folder / "m.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    document = yaml_file.read(Path("m.yaml"), "m.yaml")
    assert document.value == {"a": 1, "b": 2}
    assert document.lines[1] == "b: 2"


@pytest.mark.parametrize(("name", "reason"), [("gone.yaml", "no such file"), (".", "directory")])
def test_a_file_that_cannot_be_read_says_why(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        yaml_file.read(folder / name, name)
