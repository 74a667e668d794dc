"""Keys that change while the server runs."""

import logging
import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.config.api_key import ApiKey
from service.config.origin import Origin
from service.web import keys
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import fake_config
from tests.web.asking import CHAT
from tests.web.asking import chat_body


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    write(path, "alice: one\n")
    return path


def write(path: Path, text: str) -> None:
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def ring(file: Path, clock: Clock) -> keys.KeyRing:
    return keys.KeyRing([ApiKey("alice", SecretStr("one"))], file, clock=clock)


def test_a_changed_file_counts_from_the_next_look_on(file: Path, clock: Clock):
    found = ring(file, clock)
    assert found.name_of(b"one") == "alice"
    write(file, "alice: two\nbob: three\n")
    clock.now += keys.LOOK_S / 2
    assert found.name_of(b"one") == "alice"
    assert found.name_of(b"three") is None
    clock.now += keys.LOOK_S
    assert [found.name_of(key) for key in (b"one", b"two", b"three")] == [None, "alice", "bob"]


def test_a_file_that_changed_before_the_first_request_counts(file: Path, clock: Clock):
    write(file, "bob: two\n")
    assert ring(file, clock).name_of(b"two") == "bob"


@pytest.mark.parametrize("content", ["", "with space\n", "two\n\xff\n", None])
def test_a_broken_file_keeps_the_old_keys_and_is_one_line_in_the_log(
    file: Path, clock: Clock, caplog: pytest.LogCaptureFixture, content: str | None
):
    found = ring(file, clock)
    assert found.name_of(b"one") == "alice"
    file.unlink() if content is None else write(file, content)
    for _ in range(3):
        clock.now += 2 * keys.LOOK_S
        assert found.name_of(b"one") == "alice"
        assert found.name_of(b"two") is None
    (line,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert line.levelname == "ERROR"
    assert "the API keys stay as they were" in line.getMessage()
    assert "with space" not in caplog.text
    file.unlink(missing_ok=True)
    write(file, "bob: two\n")
    clock.now += 2 * keys.LOOK_S
    assert found.name_of(b"two") == "bob"


def test_keys_of_the_environment_are_not_replaced_by_the_file(file: Path):
    config = fake_config(api_keys=["two"], api_keys_file=file)
    config.origins["api_keys"] = Origin("env", "MOORAGE_API_KEYS")  # type: ignore[index]
    found = keys.ring(config)
    assert found.name_of(b"two") == "key-1"
    assert found.name_of(b"one") is None


def test_the_application_takes_a_new_key_without_a_restart(file: Path, monkeypatch, caplog):
    monkeypatch.setattr(keys, "LOOK_S", 0.0)
    caplog.set_level(logging.DEBUG)
    config = fake_config(api_keys=["alice: one"], api_keys_file=file)
    deployment = FakeDeployment(config)
    client = create_app(deployment).test_client()

    def ask(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        with client.post(CHAT, json=chat_body(), headers=headers) as response:
            return response.status_code

    assert [ask("one"), ask("secret-two")] == [200, 401]
    write(file, "bob: secret-two\n")
    assert [ask("one"), ask("secret-two")] == [401, 200]
    assert [s.owner for s in deployment.model.engine.submissions] == ["alice", "bob"]
    assert "secret-two" not in caplog.text


def test_every_key_is_compared_however_early_one_matches(monkeypatch):
    compared = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    some = [ApiKey(f"n{i}", SecretStr(f"k{i}")) for i in range(5)]
    assert keys.KeyRing(some).name_of(b"k0") == "n0"
    assert len(compared) == 5
