"""A few bytes that the gunicorn master and its workers share.

The worker says in it why it could not start, so that the master can exit with the status of that
error, whether it ever served, and with which configuration after a reload. A lock on it makes sure
that one worker at a time owns the model; the kernel releases the lock when that process ends,
however it ends.
"""

import fcntl
import os
import tempfile

_FAILURE = 0
_SERVED = 1
_KEPT = 2  # from here to the end


class BootRecord:
    """Made in the master before the first fork. An unnamed file: gone with the last process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # open as long as the server
        os.pwrite(self._file.fileno(), bytes(_KEPT), 0)

    def claim(self) -> bool:
        """Worker: become the owner of the model. False if another process is."""
        try:
            # A lock of the process (not of the open file, which a fork would share).
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        self._write(_SERVED, 0)
        return True

    def fail(self, exit_status: int) -> None:
        """Worker or master: the server cannot run and shall exit with this status (1 to 255)."""
        self._write(_FAILURE, exit_status)

    @property
    def failure(self) -> int:
        """The exit status of the failed start, or 0."""
        return self._read(_FAILURE)

    def set_served(self) -> None:
        """Worker: the model became ready, or the worker was asked to end."""
        self._write(_SERVED, 1)

    @property
    def served(self) -> bool:
        return self._read(_SERVED) == 1

    def keep(self, document: bytes) -> None:
        """Worker: what the next worker is to begin with, in place of what was kept before."""
        os.ftruncate(self._file.fileno(), _KEPT)
        os.pwrite(self._file.fileno(), document, _KEPT)

    @property
    def kept(self) -> bytes:
        """What `keep` got last, or nothing. Cut short if its worker ended while it wrote."""
        return os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, _KEPT)

    def _write(self, position: int, value: int) -> None:
        os.pwrite(self._file.fileno(), bytes([value]), position)

    def _read(self, position: int) -> int:
        return os.pread(self._file.fileno(), 1, position)[0]
