"""What gunicorn logs, less what an operator of Moorage has no use for, plain or as JSON."""

import datetime
import json
import logging
from typing import Any

from service.config.bar import CLEAR
from service.config.bar import Bar
from service.config.bar import Look
from service.config.bar import takes_bars
from service.config.gunicorn_record import BootRecord

_BOOT = {
    "Starting gunicorn %s",
    "Using worker: %s",
    "Booting worker with pid: %s",
    "Worker exiting (pid: %s)",
}
_FAILED_BOOT = {
    "Worker (pid:%s) exited with code %s.",
    "Shutting down: %s",
    "Reason: %s",
}
_STALLED = "Socket error processing request."


def be_quiet(log: logging.Logger, record: BootRecord) -> None:
    """Filter gunicorn's error log.

    At level debug everything stays. Otherwise: no lines about booting; after a failed start none
    but the error's own, which the worker has logged; one line and no traceback for a client that
    stalled.
    """

    def keep(line: logging.LogRecord) -> bool:
        if log.isEnabledFor(logging.DEBUG):
            return True
        if line.msg in _BOOT or (line.msg in _FAILED_BOOT and record.failure):
            return False
        if line.msg == _STALLED and line.exc_info and isinstance(line.exc_info[1], BlockingIOError):
            line.msg = "A client sent or read nothing for too long; its connection is closed."
            line.exc_info = None
            line.levelno, line.levelname = logging.INFO, "INFO"
        return True

    log.addFilter(keep)


class JsonLines(logging.Formatter):
    """One JSON object a line, for gunicorn's own lines and ours alike.

    `extra={"fields": {...}}` of a line are keys of their own; "event" there replaces the text.
    """

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "pid": record.process,
            "logger": record.name,
            "message": fields.pop("event", None) or record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def in_json(log: logging.Logger) -> None:
    """Let every handler of gunicorn's error log write JSON."""
    for handler in log.handlers:
        handler.setFormatter(JsonLines())


class AboveBar(logging.Formatter):
    """The lines of another formatter, each wiping the bar that may be where it goes."""

    def __init__(self, lines: logging.Formatter | None) -> None:
        super().__init__()
        self._lines = lines or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return CLEAR + self._lines.format(record)


def leave_room_for_bar(log: logging.Logger) -> None:
    """Before the fork: what is logged to a terminal, by whichever process, does not mix with a bar
    there.
    """
    for handler in _on_terminals(log):
        handler.setFormatter(AboveBar(handler.formatter))


def bar_below(log: logging.Logger, look: Look) -> Bar | None:
    """A bar on the terminal that this log goes to, instead of the lines that tell of progress
    (those with an attribute `progress`). None if it goes to no terminal, or as JSON.
    """
    handlers = [h for h in _on_terminals(log) if isinstance(h.formatter, AboveBar)]
    if not handlers:
        return None
    bar = Bar(handlers[0].stream, look)
    for handler in handlers:
        handler.addFilter(lambda line: not (bar.shown and hasattr(line, "progress")))
    return bar


def _on_terminals(log: logging.Logger) -> "list[logging.StreamHandler[Any]]":
    return [
        handler
        for handler in log.handlers
        if isinstance(handler, logging.StreamHandler) and takes_bars(handler.stream)
    ]


def log_like_gunicorn(log: logging.Logger) -> None:
    """Let what Moorage and its strategies log go where gunicorn's errors go, in the same form."""
    for name in ("service", "plugins", "moorage"):
        ours = logging.getLogger(name)
        ours.handlers = list(log.handlers)
        ours.setLevel(log.level)
        ours.propagate = False
