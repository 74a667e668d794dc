"""Small decisions around gunicorn, without a process."""

import shlex
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.config.api_key import ApiKey
from service.config.compute_threads import compute_environment
from service.config.gunicorn_options import settings
from service.config.ready_line import ready_line
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig


def config(bind: str = "127.0.0.1:8000", keys: tuple[str, ...] = (), threads: int = 64) -> Config:
    return Config(
        path=None,
        name="test",
        server=ServerConfig(bind=bind, threads=threads),
        deployment=DeploymentConfig(),
        origins={},
        api_keys=tuple(ApiKey(key, SecretStr(key)) for key in keys),
    )


@pytest.mark.parametrize(
    ("bind", "address", "url"),
    [
        ("127.0.0.1:8000", None, "http://127.0.0.1:8000"),
        ("0.0.0.0:80", None, "http://127.0.0.1:80"),
        ("[::]:8000", None, "http://[::1]:8000"),
        ("[fd00::1]:8000", "http://[fd00::1]:8000", "http://[fd00::1]:8000"),
        ("127.0.0.1:0", "http://127.0.0.1:45678", "http://127.0.0.1:45678"),
        ("unix:/run/moorage.sock", None, "http://localhost"),
    ],
)
def test_the_ready_line_can_be_pasted(bind: str, address: str | None, url: str) -> None:
    command = shlex.split(ready_line(config(bind), "a/model", address).partition("try: ")[2])
    assert f"{url}/v1/chat/completions" in command
    assert command[-1].startswith('{"model": "a/model"')
    assert ("--unix-socket" in command) == bind.startswith("unix:")


def test_the_ready_line_of_an_embedding_model_asks_for_an_embedding() -> None:
    line = ready_line(config("127.0.0.1:8000"), "m", embeds=True)
    command = shlex.split(line.partition("try: ")[2])
    assert "http://127.0.0.1:8000/v1/embeddings" in command
    assert command[-1].startswith('{"model": "m", "input": ')


def test_the_ready_line_never_shows_a_key() -> None:
    line = ready_line(config(keys=("s3cret",)), "m")
    assert "Bearer YOUR_KEY" in line
    assert "s3cret" not in line


def test_there_are_always_more_connections_than_threads() -> None:
    for threads in (9, 64, 1024):
        found = settings(config(threads=threads))
        assert found["worker_connections"] > found["threads"] == threads


def test_one_core_is_left_to_http() -> None:
    assert compute_environment(8)["OMP_NUM_THREADS"] == "7"
    assert compute_environment(1)["OMP_NUM_THREADS"] == "1"


def test_settings_open_nothing(tmp_path: Path) -> None:
    bind = f"unix:{tmp_path}/moorage.sock"
    assert settings(config(bind))["bind"] == bind
    assert list(tmp_path.iterdir()) == []
