"""gunicorn's server hooks: what makes it fit to carry a model.

How they talk to the app: it is a Flask app whose `extensions["moorage"]` is the deployment. In the
worker, after the fork, three attributes are set on it; then `start()` is called.

deployment.on_ready: Callable[[str], None]
    The model with this id may be used. Logs the line with the curl, which asks for an embedding if
    `deployment.embeds`.
deployment.on_failure: Callable[[ServiceError], None]
    It cannot be served. Logs the error's one line and ends worker and master, the latter with
    `error.exit_status`. Does not return, unless the server is stopping anyway.
deployment.on_death: Callable[[], None]
    The engine died after it was ready. The worker ends and a fresh one loads again. Returns at
    once.
deployment.on_reload: Callable[[Config], None]
    `moorage reload` has changed to this configuration; a fresh worker begins with it.

All of them may be called from any thread. On a terminal a bar shows `deployment.doing` and
`deployment.loading_share` while `deployment.state` says that it loads. `deployment.start()` returns
at once and raises nothing. `deployment.drain(seconds)` stops admitting, waits for what runs, ends
what is left after `seconds` with an error event, and then returns. `deployment.obey(request)`
yields the answers to a request on the control socket. While it waits it may be called again, from
another thread and with fewer seconds: the operator became impatient, and the shorter time counts.
"""

import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from gunicorn.errors import HaltServer

from service.config import control_socket
from service.config import keeping
from service.config.compute_threads import compute_environment
from service.config.compute_threads import usable_cores
from service.config.environment import process_environment
from service.config.environment import set_missing
from service.config.gunicorn_log import bar_below
from service.config.gunicorn_log import be_quiet
from service.config.gunicorn_log import in_json
from service.config.gunicorn_log import leave_room_for_bar
from service.config.gunicorn_log import log_like_gunicorn
from service.config.gunicorn_record import BootRecord
from service.config.gunicorn_worker import Worker
from service.config.ready_line import ready_line
from service.config.schema import Config
from service.errors import ConfigError
from service.errors import ControlFailed
from service.errors import Problem
from service.errors import ServiceError

Announce = Callable[[Mapping[str, Any]], None]

BODY_FACTOR = 3
"""Reading a body may take so many times what one read may: 60 s."""

DEATHS_WHILE_LOADING = 2
"""So many workers in a row killed before they were ready end the server."""

# What gunicorn's command line, GUNICORN_CMD_ARGS or WEB_CONCURRENCY must not change, and why.
FIXED = {
    "workers": "one process owns the model; more would be more copies of the weights",
    "worker_class": "only Moorage's own worker drains streams",
    "preload_app": "the model is loaded after the fork; a CUDA context does not survive one",
    "threads": "admission counts on it; set server.threads",
    "max_requests": "a fresh worker would have to load the model again",
    "reload": "a fresh worker would have to load the model again",
    "reuse_port": "one process owns the model",
    "control_socket_disable": "the control socket can add workers",
    "dirty_workers": "their streams leak into other requests",
}


class Hooks:
    """gunicorn's server hooks: one object in the master, of which each worker has a copy."""

    def __init__(self, config: Config, announce: Announce, socket_seconds: float) -> None:
        self._config = config
        self._announce = announce
        self._socket_seconds = socket_seconds
        self._record: BootRecord | None = None
        self._deaths = 0

    def by_name(self) -> dict[str, Callable[..., None]]:
        """The hooks as settings."""
        return {
            name: getattr(self, name)
            for name in (
                "nworkers_changed",
                "on_starting",
                "when_ready",
                "post_fork",
                "post_worker_init",
                "child_exit",
                "on_exit",
            )
        }

    # --- master ----------------------------------------------------------------------------------

    def nworkers_changed(self, server: Any, new: int, old: int | None) -> None:
        """First with old=None, before gunicorn logs anything; then for SIGTTIN and its like."""
        if old is None:
            refuse_overrides(server.cfg, self._config.server.threads)
            self._record = BootRecord()
            be_quiet(server.log.error_log, self._record)
            if self._config.server.log_format == "json":
                in_json(server.log.error_log)
            else:
                leave_room_for_bar(server.log.error_log)
            log_like_gunicorn(server.log.error_log)
        elif new > 1:
            server.log.warning(
                "One process owns the model: the number of workers stays 1, it does not become %s.",
                new,
            )
            server._num_workers = 1

    def on_starting(self, server: Any) -> None:
        """Before signals are handled and sockets opened."""
        for notice in self._config.notices:
            server.log.warning("%s", notice)
        for name in ("HUP", "USR2"):
            setattr(server, f"handle_{name.lower()}", _ignore(server, name))
        server.signal = _impatient(server)
        _allow_open_files(server.cfg.worker_connections + 1024)

    def when_ready(self, server: Any) -> None:
        """The sockets listen. Accepted connections inherit these limits, so that a client that
        stops sending, or never reads, lets go of its thread.
        """
        seconds, rest = divmod(self._socket_seconds, 1)
        limit = struct.pack("ll", int(seconds), int(rest * 1_000_000))
        for listener in server.LISTENERS:
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def child_exit(self, server: Any, worker: Any) -> None:
        """A worker ended otherwise than by a failed load. Killed again and again while it loads,
        most likely for lack of memory, it would be started again and again.
        """
        if self._record is None or self._record.served:
            self._deaths = 0
            return
        self._deaths += 1
        if self._deaths >= DEATHS_WHILE_LOADING and server.LISTENERS:  # without them it is stopping
            server.log.error(
                "%d workers in a row were killed while they loaded the model."
                "  fix: see `moorage plan` for the memory it needs and what else runs here;"
                " after SIGBUS, make room on the disk of the offload folder",
                self._deaths,
            )
            self._record.fail(1)
            raise HaltServer("killed while loading", 1)

    def on_exit(self, server: Any) -> None:
        """The last thing in the master: exit with the status of what failed."""
        if self._record is not None and self._record.failure:
            raise SystemExit(self._record.failure)

    # --- worker ----------------------------------------------------------------------------------

    def post_fork(self, server: Any, worker: Any) -> None:
        """Before the app is imported, and so before torch."""
        if self._record is None or not self._record.claim():
            worker.log.error(
                "Another worker of this server owns the model; this one does not load it."
            )
            raise SystemExit(1)
        worker.config, worker.record = self._current(worker.log), self._record
        worker.announce, worker.head_seconds = self._announce, self._socket_seconds
        worker.body_seconds = BODY_FACTOR * self._socket_seconds
        set_missing(compute_environment(usable_cores()))
        # `compile: true`; torch's own choice is a folder in /tmp that anybody may have made
        set_missing({"TORCHINDUCTOR_CACHE_DIR": str(worker.config.cache / "compiled")})

    def post_worker_init(self, worker: Any) -> None:
        """The app is built: load the model beside it, so that health answers meanwhile."""
        deployment = worker.wsgi.extensions["moorage"]
        address = str(worker.sockets[0])
        bar = bar_below(worker.log.error_log, lambda: _progress(deployment))

        def on_ready(model_id: str) -> None:
            if bar is not None:
                bar.stop()
            worker.record.set_served()
            worker.log.info(
                "%s", ready_line(self._config, model_id, address, embeds=deployment.embeds)
            )
            ready = {"address": address, "model": model_id, "pid": os.getppid()}
            self._announce({"ready": ready})

        def on_failure(error: ServiceError) -> None:
            if bar is not None:
                bar.stop()
            worker.fail(error)

        deployment.on_ready = on_ready
        deployment.on_failure = on_failure
        deployment.on_death = worker.die
        deployment.on_reload = lambda config: worker.record.keep(keeping.to_json(config))
        deployment.start()
        self._listen(worker, deployment, address)

    def _current(self, log: Any) -> Config:
        """The configuration of the last reload, else that of the start."""
        kept = self._record.kept if self._record is not None else b""
        if not kept:
            return self._config
        try:
            return keeping.from_json(kept, self._config.api_keys)
        except ValueError:  # its worker was killed while it wrote
            log.warning("The configuration of the last reload is lost; this is that of the start.")
            return self._config

    def _listen(self, worker: Any, deployment: Any, address: str) -> None:
        """Take commands on the control socket. Without one that was not asked for it serves all the
        same.
        """
        server = self._config.server
        bind = address.rpartition("//")[2] if server.bind.endswith(":0") else server.bind
        path = server.control_socket or control_socket.default_path(bind, process_environment())
        try:
            worker.control = control_socket.Listener(path, lambda request: deployment.obey(request))
        except ControlFailed as error:
            if server.control_socket is not None:
                worker.fail(error)
            worker.log.warning("`moorage reload` is not available: %s", error.one_line())
        else:
            worker.log.info("Control socket: %s", path)


def _progress(deployment: Any) -> tuple[str, float] | None:
    """What a bar shows; nothing once the server stops."""
    if deployment.state not in ("planned", "loading", "validating"):
        return None
    return deployment.doing, deployment.loading_share


def refuse_overrides(cfg: Any, threads: int) -> None:
    """Print what must not be set from outside and exit with the status of a configuration error.

    `cfg` is gunicorn's, with every layer applied. WEB_CONCURRENCY is only gunicorn's default for
    workers, so it would be passed over in silence.
    """
    expected: dict[str, Any] = dict.fromkeys(FIXED, False)
    expected |= {
        "workers": 1,
        "max_requests": 0,
        "dirty_workers": 0,
        "control_socket_disable": True,
    }
    expected |= {"worker_class": Worker, "threads": threads}
    problems = [
        Problem("gunicorn", name, f"is {cfg.settings[name].get()}; {reason}")
        for name, reason in FIXED.items()
        if cfg.settings[name].get() != expected[name]
    ]
    concurrency = type(cfg.settings["workers"]).default
    if concurrency > 1:
        problems.append(Problem("env WEB_CONCURRENCY", "", f"is {concurrency}; {FIXED['workers']}"))
    if problems:
        hint = "leave it out; for a second copy of the model start a second server"
        error = ConfigError(problems, hint=hint)
        sys.stderr.write(f"{error.message}\nfix: {hint}\n")  # there is no log before this
        raise SystemExit(error.exit_status)


def _ignore(server: Any, name: str) -> Callable[[], None]:
    def ignore() -> None:
        server.log.warning(
            "SIG%s ignored: it would load a second copy of the weights beside the first."
            " To use a changed configuration: `moorage reload`.",
            name,
        )

    return ignore


def _impatient(server: Any) -> Callable[[int, Any], None]:
    """A signal handler for the master that reads a second SIGTERM as SIGQUIT.

    While gunicorn waits for its workers to stop it looks for SIGINT and SIGQUIT only, and would
    drop the second SIGTERM of an operator who does not want to wait for the grace.
    """
    queue = server.SIG_QUEUE
    terms = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal terms
        if number == signal.SIGTERM:
            terms += 1
            number = signal.SIGQUIT if terms > 1 else number
        queue.put_nowait(number)

    return handler


def _allow_open_files(wanted: int) -> None:
    """Raise the soft limit: without files to open, accept() would end the worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
