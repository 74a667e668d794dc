"""How many requests may be at work at once, and whether their clients are still there."""

import math
import select
import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from service.deployment import Deployment
from service.deployment import Serving
from service.engine.scheduler import LONGEST_RETRY_AFTER_S
from service.engine.sequence import Stream
from service.errors import Overloaded
from service.web.limits import Account
from service.web.limits import Accounts

KEPT_FOR_HEALTH = 8
# What the newest request adds to the mean of how long they take.
NEWEST = 0.1
# Linux says so even when unread bytes stand before the end.
HUNG_UP: int = getattr(select, "POLLRDHUP", 0)


class Slots:
    """Places for requests that may take long; other threads stay free for health."""

    def __init__(self, threads: int, accounts: Accounts | None = None) -> None:
        """accounts: the limits of each key; without them none has any."""
        self._accounts = accounts or Accounts(dict)
        self._count = max(1, threads - KEPT_FOR_HEALTH)
        self._free = threading.BoundedSemaphore(self._count)
        self._held_s = 0.0  # lately, by one request; a race loses one value of it

    def take(self, key: str = "") -> "Slot":
        """A place, at once, for the key of that name.

        Raises RateLimited when the key has used up what it may, Overloaded when all are taken.
        """
        account = self._accounts.of(key)
        account.enter()
        if not self._free.acquire(blocking=False):
            account.leave()
            raise Overloaded(
                f"{self._count} requests are open already; try again soon",
                retry_after_s=self._retry_after_s(),
            )
        return Slot(self._free, account, self._held)

    def _held(self, seconds: float) -> None:
        """A place was held for so long."""
        self._held_s += (seconds - self._held_s) * NEWEST

    def _retry_after_s(self) -> int:
        """Whole seconds until a place is free, if all are held as long as they were lately."""
        return min(max(1, math.ceil(self._held_s / self._count)), LONGEST_RETRY_AFTER_S)


class Slot:
    """One taken place. `release` may be called from any thread and more than once."""

    def __init__(
        self, free: threading.BoundedSemaphore, account: Account, held: Callable[[float], None]
    ) -> None:
        """held: gets the seconds from now to the release."""
        self._free: threading.BoundedSemaphore | None = free
        self._held = held
        self._taken_at = time.monotonic()
        self._account = account
        self._streams: Sequence[Stream] = ()
        self._serving: Serving | None = None
        self._lock = threading.Lock()

    def use(self, deployment: Deployment, deadline: float) -> Serving:
        """The model that answers, until `release`; see `Deployment.use`."""
        self._serving = deployment.use(deadline)
        return self._serving

    def follow(self, prompt_tokens: int, streams: Sequence[Stream]) -> None:
        """Take the prompts' tokens off the key's account now, those of the answers at the end."""
        self._account.take(prompt_tokens)
        self._streams = streams

    def release(self) -> None:
        with self._lock:
            free, self._free = self._free, None
        if free is not None:
            self._account.take(sum(stream.completion_tokens for stream in self._streams))
            self._account.leave()
            self._held(time.monotonic() - self._taken_at)
            free.release()
            if self._serving is not None:
                self._serving.uses.leave()


def client_gone(environ: Mapping[str, Any]) -> bool:
    """Whether the client has closed its end. Never blocks.

    Known under gunicorn only, which hands out its socket; elsewhere always False. A client that
    closes only its sending half counts as gone: no HTTP client in use does that.
    """
    connection = environ.get("gunicorn.socket")
    if connection is None:
        return False
    try:
        # poll, because select fails for file descriptors from 1024 on.
        poll = select.poll()
        poll.register(connection, select.POLLIN | HUNG_UP)
        events = poll.poll(0)
        if not events:
            return False
        if events[0][1] & (HUNG_UP | select.POLLHUP | select.POLLERR | select.POLLNVAL):
            return True
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    except ValueError:  # a closed socket, or TLS, which cannot peek
        return bool(connection.fileno() < 0)
