"""What deploy/ has, around the web room under a real gunicorn: nginx, systemd, a health check."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.config.flags import Flags
from service.config.gunicorn_options import settings
from service.config.reading import load
from service.config.schema import ServerConfig
from tests.server.process import LIMIT_S
from tests.server.process import ROOT
from tests.server.process import Server
from tests.server.process import wait_for
from tests.support.fake_deployment import MODEL_ID

CONF = (ROOT / "deploy/nginx.conf").read_text(encoding="utf-8")
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
KEY = {"Authorization": "Bearer k-something-long"}
# the frame that a distribution has around conf.d, with every path in one folder
AROUND = """\
daemon off;
pid {folder}/pid;
error_log stderr;
{user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{conf}
}}
"""

needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx here: apt-get install nginx-light")


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    """The socket on which systemd waits for a service of Type=notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path_factory.mktemp("systemd") / "s"))
        listening.settimeout(LIMIT_S)
        yield listening


@pytest.fixture(scope="module")
def behind(systemd: socket.socket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Says the first tokens of an answer and never ends it."""
    folder = tmp_path_factory.mktemp("behind")
    ours = {"MOORAGE_BIND": "127.0.0.1:0", "MOORAGE_THREADS": "16", "FAKE_ENGINE": "hang"}
    keys = {"MOORAGE_API_KEYS": "k-something-long", "MOORAGE_LOG_FORMAT": "json"}
    conf = str(ROOT / "tests/server/web_conf.py")
    ours["NOTIFY_SOCKET"] = systemd.getsockname()
    with Server(folder / "log", conf=conf, cwd=folder, **ours, **keys) as server:
        wait_for("an answer", lambda: server.port and server.try_get("/health/ready") == 200)
        yield server


@pytest.fixture(scope="module")
def nginx(behind: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket on which nginx listens."""
    folder = tmp_path_factory.mktemp("nginx")
    address = folder / "s"
    conf = CONF.replace("127.0.0.1:8000", f"127.0.0.1:{behind.port}")
    conf = re.sub(r"listen 80;", f"listen unix:{address};", conf)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder, user=user, conf=conf))
    with (folder / "log").open("wb") as log:
        command = (str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"))
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for("nginx", lambda: address.exists() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(LIMIT_S)


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket, under the name that nginx serves."""

    def __init__(self, address: Path) -> None:
        super().__init__("moorage.example.org", timeout=LIMIT_S)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(str(self._address))


def ask(connection: Connection, content: str, **headers: str) -> http.client.HTTPResponse:
    message = {"role": "user", "content": content}
    body: dict[str, Any] = {"model": MODEL_ID, "messages": [message], "stream": True}
    sent = {"Content-Type": "application/json", **KEY, **headers}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), sent)
    return connection.getresponse()


@needs_nginx
def test_tokens_come_through_before_the_answer_ends(behind: Server, nginx: Path):
    """This answer never does. When the client leaves, the server is told."""
    with contextlib.closing(Connection(nginx)) as connection:
        response = ask(connection, "Hi", **{"X-Request-Id": "mine"})
        assert response.status == 200
        assert response.headers["x-request-id"] == "mine"
        while not re.search(rb'"content": ?"[^"]', response.readline()):
            pass
        response.close()
    wait_for("the end of it", lambda: "client_closed_request" in behind.log())


@needs_nginx
def test_what_is_too_large_is_told_by_moorage(nginx: Path):
    with contextlib.closing(Connection(nginx)) as connection:
        response = ask(connection, "a" * (ServerConfig().max_body + 1))
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "request_too_large"


@needs_nginx
def test_a_request_without_an_id_or_a_key_is_answered_as_ever(nginx: Path):
    with contextlib.closing(Connection(nginx)) as connection:
        connection.request("GET", "/health/ready")
        response = connection.getresponse()
        response.read()
        assert (response.status, len(response.headers["x-request-id"])) == (200, 32)
        connection.request("GET", "/v1/models")
        response = connection.getresponse()
        assert response.status == 401
        assert json.loads(response.read())["error"]["code"] == "invalid_api_key"


def test_its_limits_are_beyond_ours():
    server = ServerConfig()
    found = dict(re.findall(r"^ +(\w+) +(\d+)[sm];", CONF, re.MULTILINE))
    assert int(found["proxy_read_timeout"]) > server.request_timeout_s
    assert int(found["client_max_body_size"]) * 2**20 > server.max_body
    # nginx must be the one that closes, or a request meets a connection that is being closed
    assert int(found["keepalive_timeout"]) < settings(load(None, {}, Flags()))["keepalive"]


def test_systemd_is_told_when_the_port_is_open(behind: Server, systemd: socket.socket):
    unit = (ROOT / "deploy/moorage.service").read_text()
    assert "Type=notify\n" in unit
    assert systemd.recv(1000).startswith(b"READY=1\n")
    assert behind.try_get("/health/live") == 200


def test_the_health_check_of_the_image_fails_where_nothing_answers(behind: Server):
    text = (ROOT / "deploy/Dockerfile").read_text()
    [check] = re.findall(r"HEALTHCHECK .*\\\n +CMD (\[.*\])", text)
    program, *arguments = json.loads(check)
    assert program == "python"
    with socket.socket() as unused:  # bound, so that nobody else listens there
        unused.bind(("127.0.0.1", 0))
        for port, healthy in ((behind.port, True), (unused.getsockname()[1], False)):
            command = [word.replace(":8000/", f":{port}/") for word in arguments]
            done = subprocess.run([sys.executable, *command], capture_output=True, check=False)
            assert (done.returncode == 0) is healthy
