"""The API keys at work: compared in constant time, read again when their file changes."""

import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

from service.config import api_keys
from service.config.api_key import ApiKey
from service.config.origin import BUILT_IN
from service.config.origin import Origin
from service.config.schema import Config
from service.errors import ConfigError

LOG = logging.getLogger(__name__)
LOOK_S = 1.0
"""The file is looked at that often at most."""

Signature = tuple[int, int, int]


class KeyRing:
    """Which keys are valid. Any thread."""

    def __init__(
        self,
        keys: Sequence[ApiKey],
        file: Path | None = None,
        origin: Origin = BUILT_IN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """file: where the keys came from and may change; None if they cannot. clock: seconds."""
        self._digests = _digests(keys)
        self._file = file
        self._origin = origin
        self._clock = clock
        # Not that of the file now: it may have changed since its keys were read.
        self._seen: Signature | None = None
        self._look_at = clock()
        self._looking = threading.Lock()

    @property
    def needed(self) -> bool:
        """Whether a key must be shown. A server with keys never becomes one without."""
        return bool(self._digests)

    def name_of(self, given: bytes) -> str | None:
        """The name of a key, or None if it is not valid."""
        self._look()
        digest = hashlib.sha256(given).digest()
        # All keys are compared, so that the time taken says nothing about which one was near.
        names = [name for known, name in self._digests if hmac.compare_digest(digest, known)]
        return names[0] if names else None

    def _look(self) -> None:
        """Read the file again if it has changed; what cannot be read changes nothing."""
        if self._file is None or self._clock() < self._look_at:
            return
        if not self._looking.acquire(blocking=False):
            return  # another thread is at it; the keys before are good for this request
        try:
            self._look_at = self._clock() + LOOK_S
            now = _signature(self._file)
            if now == self._seen:
                return
            self._seen = now
            keys, _ = api_keys.from_file(self._file, self._origin)
            digests = _digests(keys)
            if digests != self._digests:
                self._digests = digests
                LOG.info("the API keys were read again: %d keys", len(keys))
        except ConfigError as error:
            LOG.error("the API keys stay as they were: %s", error.one_line())
        finally:
            self._looking.release()


def ring(config: Config) -> KeyRing:
    """The keys of this configuration; those of the environment cannot change."""
    chosen = config.origins.get("api_keys")
    file = config.server.api_keys_file
    if chosen is not None and chosen.name == "MOORAGE_API_KEYS":
        file = None
    origin = config.origins.get("server.api_keys_file", BUILT_IN)
    return KeyRing(config.api_keys, file, origin)


def _digests(keys: Sequence[ApiKey]) -> list[tuple[bytes, str]]:
    return [(hashlib.sha256(k.key.get_secret_value().encode()).digest(), k.name) for k in keys]


def _signature(file: Path) -> Signature:
    """What changes with the file; (0, 0, 0) if there is none."""
    try:
        found = file.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
