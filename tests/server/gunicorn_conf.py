"""gunicorn.conf.py for the fake app: the product's settings, less what a test shortens."""

import os

from service.config.gunicorn_options import settings
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from tests.server import patience

patience.apply()
_server = ServerConfig(
    bind=os.environ.get("TEST_BIND", "127.0.0.1:0"),
    threads=16,
    grace_s=float(os.environ.get("TEST_GRACE_S", "30")),
)
_config = Config(path=None, name="test", server=_server, deployment=DeploymentConfig(), origins={})
globals().update(
    settings(_config, socket_seconds=float(os.environ.get("TEST_SOCKET_SECONDS", "20")))
)
wsgi_app = "tests.server.fake_app:create_app"

if os.environ.get("TEST_EXTRA_WORKER"):
    _when_ready, _child_exit = globals()["when_ready"], globals()["child_exit"]

    def when_ready(server):  # type: ignore[no-untyped-def]
        """Let SIGUSR1 ask for a second worker, past everything that prevents it."""
        _when_ready(server)
        server.handle_usr1 = lambda: setattr(server, "_num_workers", 2)

    def child_exit(server, worker):  # type: ignore[no-untyped-def]
        """One try is enough."""
        server._num_workers = 1
        _child_exit(server, worker)
