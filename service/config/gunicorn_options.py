"""The configuration as gunicorn settings.

`gunicorn -c gunicorn.conf.py` and `moorage serve` both use `settings(config)`, so they behave
alike. The gunicorn master imports this module: never torch.
"""

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.config.gunicorn_hooks import Announce
from service.config.gunicorn_hooks import Hooks
from service.config.gunicorn_worker import Worker
from service.config.schema import Config
from service.errors import PluginError

APP = "service.web.wsgi:build"
"""A function from Config to the Flask app. Imported and called in the worker."""
SOCKET_SECONDS = 20.0
"""How long one read from or write to a client may block a thread, and a request's head may take."""


def say_nothing(document: Mapping[str, Any]) -> None:
    """The `announce` of a server that is watched by people only: they read the log."""


def settings(
    config: Config,
    *,
    announce: Announce = say_nothing,
    socket_seconds: float = SOCKET_SECONDS,
) -> dict[str, Any]:
    """gunicorn's settings for this configuration, hooks included.

    `announce` is called in the worker with what a program wants to know: {"ready": {...}} or, when
    the model cannot be served, {"error": {...}}.

    Raises PluginError if another package hides the built-in strategies.
    """
    check_plugins_package()
    server = config.server
    hooks = Hooks(config, announce, socket_seconds)
    return {
        "wsgi_app": APP,
        "proc_name": "moorage",
        "bind": server.bind,
        "backlog": 128,  # beyond it the kernel refuses: better than an endless silent queue
        "umask": 0o007,  # of a unix socket: gunicorn's default lets every user of the machine in
        "workers": 1,
        "worker_class": Worker,
        "threads": server.threads,
        "worker_connections": max(512, 2 * server.threads),
        "preload_app": False,
        "timeout": 120,  # of the main loop's heartbeat, not of requests: trips on a held GIL
        "graceful_timeout": math.ceil(server.grace_s),
        "keepalive": 5,
        "max_requests": 0,
        "reload": False,
        "reuse_port": False,
        "dirty_workers": 0,
        "limit_request_line": 4094,
        "limit_request_fields": 64,
        "limit_request_field_size": 8190,
        "http_protocols": "h1",
        "forwarded_allow_ips": "127.0.0.1,::1",
        "control_socket_disable": True,
        # The heartbeat's file must not sit on a slow disk.
        "worker_tmp_dir": "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None,  # noqa: S108
        "accesslog": None,  # the app logs its requests itself
        "errorlog": "-",
        "loglevel": "info",
        **hooks.by_name(),
    }


def check_plugins_package() -> None:
    """Raise PluginError if another package named `plugins` hides the one beside `service`."""
    home = Path(__file__).resolve().parents[2]
    spec = importlib.util.find_spec("plugins")
    found = spec.origin if spec is not None else None
    if found is None or Path(found).resolve().parents[1] != home:
        raise PluginError(
            f"`plugins` is {found or 'not a package with code'},"
            f" not the strategies beside {home / 'service'}",
            hint="rename that package, or start Moorage from another folder",
        )
