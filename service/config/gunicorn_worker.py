"""gunicorn's threaded worker, with what a process that holds a model needs.

What differs from gunicorn 27's ThreadWorker, and why:

- Closing. gunicorn drains a closing connection for up to 2 s in the main thread, so ten clients
  that do not close their side stop accept() and the heartbeat for 20 s. Here a closing connection
  waits in the worker's own poller; nothing blocks.
- Stopping. gunicorn stops accepting at SIGTERM: connections made afterwards hang in the backlog
  until the process ends, and streams are cut without an event. Here the worker goes on accepting
  while it drains, so that readiness and new requests get their 503 at once, with `Connection:
  close`; running streams finish or get an error event; then the listener is closed and the process
  exits with 0.
- Leaving. The worker ends with os._exit: an ordinary exit waits for every request thread and then
  takes the interpreter apart under the threads of the model.
- Slow senders. A request's head must be complete within `head_seconds`, however it trickles in,
  and reading its body may take `body_seconds` in all; under TLS the handshake counts as well.
- Errors of the HTTP parser are JSON in the one error shape, not HTML.

The main thread runs the poller; every method here runs on it unless its docstring says otherwise.
Signal handlers only queue a call to it.
"""

import contextlib
import json
import logging
import math
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

from gunicorn import util
from gunicorn.arbiter import Arbiter
from gunicorn.http import wsgi
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER
from gunicorn.workers.gthread import ThreadWorker

from service.config.timed_body import TimedBody
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.config.control_socket import Listener
    from service.config.gunicorn_record import BootRecord
    from service.config.schema import Config

LINGER_SECONDS = 2.0
LINGER_BYTES = 8 * 2**20
RESERVE_SECONDS = 3.0
"""What the end of a stop takes from the grace: the last events, the closing of connections."""
FLUSH_SECONDS = 2.0
QUICK_DRAIN_SECONDS = 0.5
QUICK_FLUSH_SECONDS = 2.0
FAREWELL_SECONDS = 0.7
"""For sending spans at the very end: less than what is left of the reserve."""
DIED = 70
"""Exit status of a worker whose engine died: not 3 or 4, so that the master starts a fresh one."""


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """The one process that owns the model. The post_fork hook sets its public attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config: Config | None = None
        self.record: BootRecord | None = None
        self.control: Listener | None = None
        self.announce: Callable[[Mapping[str, Any]], None] | None = None
        self.head_seconds = 20.0
        self.exit_status = 0
        self._leave_at: float | None = None
        self._lingering: dict[socket.socket, tuple[float, int]] = {}
        self.body_seconds = 60.0
        self._reading: dict[Any, float] = {}  # connection -> when its reader is woken

    def init_process(self) -> None:
        # Module constants of gunicorn, changed in this process only: it has no setting for either.
        util.write_error = write_json_error
        wsgi.SERVER = "moorage"
        super().init_process()

    def init_signals(self) -> None:
        super().init_signals()
        # The terminal went away: the master says that it ignores this, and the default would end
        # us.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def load_wsgi(self) -> None:
        """Import the app's factory, which `wsgi_app` names, and give it the configuration.

        The configuration comes from the master, so that a worker that was started again does not
        read a file that has been edited since, or one that it may no longer read.
        """
        try:
            build = self.app.wsgi()
            self.wsgi = build(self.config)
        except ServiceError as error:
            self.fail(error)

    def run(self) -> None:
        super().run()
        self._leave()

    # --- what the deployment tells us; called from its threads -----------------------------------

    def fail(self, error: ServiceError) -> None:
        """The deployment cannot be served: log one line, end worker and master.

        Any thread. Does not return, unless the server is stopping anyway. The status is gunicorn's
        own for a failed boot, on which the master halts; it then exits with the error's
        `exit_status`.
        """
        if self._leave_at is not None:
            self.log.info("Stopping; the load ended with: %s", error.one_line())
            return
        self.log.error("%s", error.one_line())
        if self.announce is not None:
            self.announce({"error": error.as_dict()})
        if self.record is not None:
            self.record.fail(error.exit_status or 1)
        logging.shutdown()
        os._exit(Arbiter.WORKER_BOOT_ERROR)

    def die(self) -> None:
        """The engine is dead: let the errors reach the clients, then make room for a fresh worker.

        Any thread; returns at once.
        """
        self.log.error(
            "The engine stopped; this worker ends and a fresh one loads the model again."
        )
        self.method_queue.defer(self._stop, QUICK_DRAIN_SECONDS, QUICK_FLUSH_SECONDS, DIED)

    # --- stopping --------------------------------------------------------------------------------

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: running streams get the grace."""
        drain_s = max(1.0, self.cfg.graceful_timeout - RESERVE_SECONDS)
        self.method_queue.defer(self._stop, drain_s, FLUSH_SECONDS)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT, SIGQUIT, and what a second SIGTERM becomes: streams get their error event now."""
        self.method_queue.defer(self._stop, QUICK_DRAIN_SECONDS, QUICK_FLUSH_SECONDS)

    def is_parent_alive(self) -> bool:
        if super().is_parent_alive():
            return True
        # The master was killed. Whoever restarts it needs the port and the memory.
        self._stop(QUICK_DRAIN_SECONDS, QUICK_FLUSH_SECONDS)
        self.alive = False
        return False

    def _stop(self, drain_s: float, flush_s: float, exit_status: int = 0) -> None:
        """Begin to stop, or stop sooner than was planned. The process is gone after the sum."""
        leave_at = time.monotonic() + drain_s + flush_s
        if self._leave_at is None:
            self.exit_status = exit_status
            self.log.info("Stopping: new requests get 503, running ones have %.3g s.", drain_s)
            self.cfg.set("keepalive", 0)  # every answer from now on says Connection: close
            self._cap_keepalive(time.monotonic() + STOP_KEEPALIVE_LINGER)
        elif leave_at >= self._leave_at:
            return
        self._leave_at = leave_at
        threading.Thread(target=self._drain, args=(drain_s,), name="drain", daemon=True).start()
        # A drain that hangs or a request thread that never returns does not keep the process.
        last_resort = threading.Timer(drain_s + flush_s, self._leave)
        last_resort.daemon = True
        last_resort.start()

    def _drain(self, seconds: float) -> None:
        """A thread of its own, because the main thread goes on answering meanwhile."""
        deployment = _deployment(self)
        try:
            if deployment is not None:
                deployment.drain(seconds)
        except Exception:  # whatever is wrong with the model must not keep the process from ending
            self.log.exception("The drain failed.")
        self.method_queue.defer(self._end_loop)

    def _end_loop(self) -> None:
        """Nothing runs any more: leave the accept loop; what is being written may be finished."""
        if self._leave_at is not None:
            # Rounded up: at 0 gunicorn waits for nobody. The last resort keeps the exact time.
            left_s = max(1, math.ceil(self._leave_at - time.monotonic()))
            self.cfg.set("graceful_timeout", left_s)
        self.alive = False

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive:
            # Closed at once, a new client is refused; left open, it would wait in the backlog.
            for listener in self.sockets:
                listener.close()

    def _leave(self) -> None:
        """End the process. Any thread."""
        for farewell in _extensions(self).get("moorage_farewells", ()):
            farewell(FAREWELL_SECONDS)
        if self.exit_status == 0 and self.record is not None:
            self.record.set_served()
        if self.control is not None:
            self.control.close()
        logging.shutdown()
        os._exit(self.exit_status)

    # --- connections -----------------------------------------------------------------------------

    def handle(self, conn: Any) -> Any:
        """Read and answer one request. A request thread."""
        self._reading[conn] = time.monotonic() + self.head_seconds
        try:
            return super().handle(conn)
        finally:
            self._reading.pop(conn, None)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head has been read. A request thread."""
        self._reading.pop(conn, None)
        req.body = TimedBody(req.body, conn, self._reading, self.body_seconds)
        return super().handle_request(req, conn)

    def finish_request(self, conn: Any, fs: Any) -> None:
        if fs.cancelled() or fs.exception() is not None or fs.result():
            super().finish_request(conn, fs)
        else:
            self._linger(conn.sock)

    def murder_pending(self) -> None:
        """Called once in every round of the loop."""
        super().murder_pending()
        now = time.monotonic()
        for sock, (until, _) in list(self._lingering.items()):
            if until > now:
                break  # in the order in which they began
            self._end_linger(sock)
        for conn, until in list(self._reading.items()):
            if until <= now and self._reading.pop(conn, None) is not None:
                _wake_reader(conn.sock)

    def _linger(self, sock: socket.socket) -> None:
        """Say that we are done and wait for the client to close (RFC 9112, 9.6).

        Closing at once would reset a connection with unread data and could take the end of the
        answer with it. The connection counts towards worker_connections until it is closed.
        """
        self._lingering[sock] = (time.monotonic() + LINGER_SECONDS, 0)
        try:
            sock.setblocking(False)
            sock.shutdown(socket.SHUT_WR)
            self.poller.register(sock, 1, self._on_lingering_readable)
        except (OSError, ValueError, KeyError):  # the client is gone already
            self._end_linger(sock)

    def _on_lingering_readable(self, sock: socket.socket) -> None:
        until, received = self._lingering[sock]
        try:
            data = sock.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:
            data = b""
        received += len(data)
        if not data or received > LINGER_BYTES:
            self._end_linger(sock)
        else:
            self._lingering[sock] = (until, received)

    def _end_linger(self, sock: socket.socket) -> None:
        del self._lingering[sock]
        with contextlib.suppress(OSError, ValueError, KeyError):
            self.poller.unregister(sock)
        util.close(sock)
        self.nr_conns -= 1


def _deployment(worker: Any) -> Any:
    """The app's deployment, or None while the app has not been built."""
    return _extensions(worker).get("moorage")


def _extensions(worker: Any) -> dict[str, Any]:
    """What the app hands to its worker; empty while it has not been built."""
    found: dict[str, Any] = getattr(getattr(worker, "wsgi", None), "extensions", {})
    return found


def _wake_reader(sock: socket.socket) -> None:
    """Let the thread that reads from this socket see its end. It can still be written to."""
    with contextlib.suppress(OSError):
        # Of the plain socket also under TLS, whose own shutdown would end the encryption.
        socket.socket.shutdown(sock, socket.SHUT_RD)


def write_json_error(sock: Any, status: int, reason: str, message: str) -> None:
    """Answer a request that never reached the app. The signature is gunicorn's
    `util.write_error`.
    """
    error = {
        "message": message or reason,
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": None,
        "code": reason.lower().replace(" ", "_"),
    }
    body = json.dumps({"error": error}).encode()
    head = (
        f"HTTP/1.1 {status} {reason}\r\nServer: moorage\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    util.write_nonblock(sock, head.encode("latin-1") + body)
