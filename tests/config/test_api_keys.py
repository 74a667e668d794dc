"""API keys come from the environment or a file of their own, and are never printed."""

from pathlib import Path

import pytest

from service.config.schema import Config
from tests.config.conftest import Load
from tests.config.conftest import Refusal

FILE = "version: 1\nserver:\n  api_keys_file: keys\ndeployments: {a: }\n"


def keys(config: Config) -> list[str]:
    return [key.key.get_secret_value() for key in config.api_keys]


def write_keys(folder: Path, text: str, mode: int = 0o600) -> None:
    (folder / "keys").write_text(text)
    (folder / "keys").chmod(mode)


def test_keys_of_the_environment_are_separated_by_commas(load: Load) -> None:
    config = load(None, {"MOORAGE_API_KEYS": "one, two,,one,"})
    assert keys(config) == ["one", "two"]
    assert str(config.origins["api_keys"]) == "env MOORAGE_API_KEYS"


def test_keys_of_a_file_are_its_lines(load: Load, folder: Path) -> None:
    write_keys(folder, "# ours\none\n\n  two  \r\n  # theirs\n#three\n")
    config = load(FILE)
    assert keys(config) == ["one", "two"]
    assert config.notices == ()
    assert str(config.origins["api_keys"]) == "moorage.yaml:3"


def test_the_environment_wins_with_a_notice(load: Load, folder: Path) -> None:
    write_keys(folder, "one\n")
    config = load(FILE, {"MOORAGE_API_KEYS": "two"})
    assert keys(config) == ["two"]
    assert config.notices == (
        f"MOORAGE_API_KEYS is set; the keys in {folder}/keys (moorage.yaml:3) are not used.",
    )


def test_a_file_that_everybody_can_read_gets_a_notice(load: Load, folder: Path) -> None:
    write_keys(folder, "one\n", 0o644)
    config = load(FILE)
    assert keys(config) == ["one"]
    assert "chmod 600" in config.notices[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "keys cannot be read: No such file or directory"),
        ("", "keys has no key in it"),
        ("# only\n\n", "keys has no key in it"),
        ("good\nwith space\n", "keys: line 2 has a space or a character"),
        ("schlüssel\n", "keys: line 1 has a space or a character"),
        ("alice: one\nbob: one\n", "keys: line 2 has the key of alice again"),
        ("one\n b c: two\n", "keys: line 2 has a name that is not"),
        ("default: one\n", "keys: line 1 has a name that is kept"),
        ("key-1: one\n", "keys: line 1 has a name that is kept"),
        ("alice: \n", "keys: line 1 has a name without a key"),
    ],
)
def test_a_file_without_usable_keys_is_refused(
    refusal: Refusal, folder: Path, content: str | None, message: str
) -> None:
    if content is not None:
        write_keys(folder, content)
    error = refusal(FILE)
    assert str(error).startswith(f"moorage.yaml:3:3: server.api_keys_file: {folder}/")
    assert message in str(error)
    assert "with space" not in str(error)


@pytest.mark.parametrize("value", [",", "a b", "ä"])
def test_a_variable_without_usable_keys_is_refused(refusal: Refusal, value: str) -> None:
    error = refusal(None, {"MOORAGE_API_KEYS": value})
    assert str(error).startswith("env MOORAGE_API_KEYS")
    assert "a b" not in str(error)


def test_no_key_is_printed(load: Load) -> None:
    assert "hidden" not in repr(load(None, {"MOORAGE_API_KEYS": "hidden"}))


def names(config: Config) -> list[tuple[str, str]]:
    return [(key.name, key.key.get_secret_value()) for key in config.api_keys]


def test_a_key_may_have_a_name_and_a_name_several_keys(load: Load, folder: Path) -> None:
    write_keys(folder, "one\nalice: two\nthree\nalice:   sk:with:colons\n")
    assert names(load(FILE)) == [
        ("key-1", "one"),
        ("alice", "two"),
        ("key-2", "three"),
        ("alice", "sk:with:colons"),
    ]


def test_keys_of_the_environment_may_have_names(load: Load) -> None:
    config = load(None, {"MOORAGE_API_KEYS": "alice: one, two"})
    assert names(config) == [("alice", "one"), ("key-1", "two")]


def test_a_limit_for_nobody_gets_a_notice(load: Load) -> None:
    limits = "{alice: {concurrent: 1}, alcie: {concurrent: 1}, default: {concurrent: 2}}"
    env = {"MOORAGE_KEY_LIMITS": limits}
    (notice,) = load(None, {"MOORAGE_API_KEYS": "alice: k"} | env).notices
    assert notice == (
        "server.key_limits (env MOORAGE_KEY_LIMITS) has alcie: no API key has that name."
    )
    (notice,) = load(None, env).notices
    assert "has alice, alcie, default: no API key" in notice


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("key_limits: {'a b': {concurrent: 1}}", "is no name of a key"),
        ("key_limits: {alice: {concurrent: 0}}", "concurrent is 0; give 1 or more"),
        ("key_limits: {alice: {concurent: 1}}", "did you mean 'concurrent'?"),
        ("key_limits: {alice: 3}", "give a mapping"),
        ("cors_origins: [app.example]", "is no web origin; write https://app.example"),
        ("cors_origins: ['https://app.example/']", "without a path"),
        ("cors_origins: ['https://App.example']", "in lower case"),
        ("log_format: xml", "log_format"),
    ],
)
def test_wrong_limits_origins_and_formats_are_named(
    refusal: Refusal, line: str, message: str
) -> None:
    error = refusal(f"version: 1\nserver:\n  {line}\ndeployments: {{a: }}\n")
    assert str(error).startswith("moorage.yaml:3:")
    assert message in str(error)


@pytest.mark.parametrize(
    "origin", ["*", "https://app.example", "http://localhost:3000", "http://[::1]:80"]
)
def test_web_origins_as_browsers_send_them_are_taken(load: Load, origin: str) -> None:
    config = load(None, {"MOORAGE_CORS_ORIGINS": f"['{origin}']"})
    assert config.server.cors_origins == (origin,)
