"""API keys come from the environment or a file of their own, and are never printed."""

from pathlib import Path

import pytest

from service.config.schema import Config
from tests.config.conftest import Load
from tests.config.conftest import Refusal

FILE = "version: 1\nserver:\n  api_keys_file: keys\ndeployments: {a: }\n"


def keys(config: Config) -> list[str]:
    return [key.get_secret_value() for key in config.api_keys]


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
