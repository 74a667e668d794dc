"""The control socket: one user's, refused in words when it is not."""

import json
import os
import socket
import stat
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from service.config import control_socket
from service.config import keeping
from service.config import reading
from service.config.control_socket import Listener
from service.config.control_socket import ask
from service.config.control_socket import default_path
from service.config.flags import Flags
from service.errors import ControlFailed


def echo(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"progress": {"share": 0.5}}
    yield {"result": dict(request)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "s"


def test_a_request_gets_its_answers(path: Path) -> None:
    Listener(path, echo)
    assert list(ask(path, {"command": "x"})) == [
        {"progress": {"share": 0.5}},
        {"result": {"command": "x"}},
    ]


def test_only_its_user_may_use_it(path: Path) -> None:
    Listener(path, echo)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.lstat().st_mode) == 0o700


@pytest.mark.parametrize(
    "sent", [b"\n", b"[1]\n", b"{\n", b"\xff\xfe\n", b"[" * 60_000 + b"\n", b"x" * 65_000 + b"\n"]
)
def test_what_is_no_request_is_an_empty_one(path: Path, sent: bytes) -> None:
    Listener(path, echo)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        lines = connection.makefile("rb").read().splitlines()
    assert json.loads(lines[-1]) == {"result": {}}


def test_who_leaves_harms_nobody(path: Path) -> None:
    Listener(path, echo)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
    assert list(ask(path, {}))[-1] == {"result": {}}


def test_what_a_server_left_behind_is_replaced(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    path.chmod(0o600)
    Listener(path, echo)
    assert list(ask(path, {}))


def test_a_socket_in_use_is_not_taken_over(path: Path) -> None:
    Listener(path, echo)
    with pytest.raises(ControlFailed, match="another server listens"):
        Listener(path, echo)
    assert list(ask(path, {}))


def test_closing_removes_it(path: Path) -> None:
    listener = Listener(path, echo)
    listener.close()
    with pytest.raises(ControlFailed, match="no server listens on"):
        list(ask(path, {}))


def test_a_server_that_ends_while_it_is_looked_for_is_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener(path, echo)
    check = control_socket._check_folder

    def late(folder: Path) -> None:
        check(folder)
        listener.close()

    monkeypatch.setattr(control_socket, "_check_folder", late)
    with pytest.raises(ControlFailed, match="no server listens on"):
        list(ask(path, {}))


def open_folder(path: Path) -> str:
    path.parent.chmod(0o755)
    return "has mode 0755, so that others may enter"


def open_socket(path: Path) -> str:
    path.chmod(0o666)
    return "has mode 0666, not 0600"


def a_file(path: Path) -> str:
    path.unlink()
    path.touch(0o600)
    return "is no socket"


def a_link(path: Path) -> str:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))
    return "is no folder"


def anothers(path: Path) -> str:
    os.chown(path, 12345, -1)
    return f"belongs to user 12345, and this is user {os.geteuid()}"


@pytest.mark.parametrize("spoil", [open_folder, open_socket, a_file, a_link, anothers])
def test_what_others_could_use_is_refused(path: Path, spoil: Callable[[Path], str]) -> None:
    if spoil is anothers and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    Listener(path, echo)
    said = spoil(path)
    with pytest.raises(ControlFailed, match=said):
        list(ask(path, {}))
    with pytest.raises(ControlFailed):
        Listener(path, echo)


def test_a_server_that_ends_before_its_answer_is_told(path: Path) -> None:
    Listener(path, lambda request: [{"progress": {}}])
    with pytest.raises(ControlFailed, match="ended before it had answered"):
        list(ask(path, {}))


def test_another_users_process_is_not_answered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "_peer", lambda connection: os.geteuid() + 1)
    Listener(path, echo)
    with pytest.raises(ControlFailed, match="ended before it had answered"):
        list(ask(path, {}))


def test_a_path_that_the_kernel_does_not_take_is_refused_with_the_way_out(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100) / "s"
    for use in (lambda: Listener(long, echo), lambda: list(ask(long, {}))):
        with pytest.raises(ControlFailed, match="longer than 107 bytes") as refused:
            use()
        assert "server.control_socket" in str(refused.value.hint)


def test_each_address_has_a_path_of_its_own() -> None:
    env = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert default_path("127.0.0.1:8000", env) == Path("/run/user/7/moorage/127.0.0.1-8000.sock")
    paths = {
        default_path(bind, env)
        for bind in ("127.0.0.1:8000", "127.0.0.1:8001", "[::1]:8000", "unix:/a/b", "unix:/a-b")
    }
    assert len(paths) == 5
    assert default_path("h:1", {}).parent.name == f"moorage-{os.geteuid()}"
    assert default_path("h:1", {"XDG_RUNTIME_DIR": "here"}) == default_path("h:1", {})


WORDS = """
version: 1
server: {key_limits: {default: {concurrent: 3}}, cors_origins: ['https://a.example']}
deployments:
  here:
    strategy_dirs: [./mine]
    options: {first: [1, 2.5, null, true]}
    keep_free: {cuda: 1GiB}
    fallback: [auto-shard, {strategy: cpu, quantize: int8}]
"""


def test_a_configuration_outlives_its_worker_but_for_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "moorage.yaml"
    file.write_text(WORDS)
    flags = Flags(file, None, (("max_context", "128", "--set"),))
    config = reading.load(file, {"MOORAGE_API_KEYS": "alice: a-secret-of-some-length"}, flags)
    document = keeping.to_json(config)
    assert b"a-secret" not in document
    assert keeping.from_json(document, config.api_keys) == config
    with pytest.raises(ValueError, match="JSON"):
        keeping.from_json(document[:-5], ())


def test_a_reload_reads_the_file_as_it_is_now_with_the_same_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "moorage.yaml"
    text = "version: 1\ndeployment: a\ndeployments: {a: {max_context: 1}, b: {max_context: 2}}\n"
    file.write_text(text)
    flags = Flags(None, None, (("max_sequences", "3", "--set"),))
    config = reading.load(file, {}, flags)
    file.write_text(text.replace("max_context: 1", "max_context: 7"))
    again = reading.again(config)
    assert (again.deployment.max_context, again.deployment.max_sequences) == (7, 3)
    assert reading.again(again, "b").deployment.max_context == 2
