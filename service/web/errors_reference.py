"""The reference of all errors, made from their classes.

`python -m service.web.errors_reference` prints docs/errors.md.
"""

import inspect
import sys
from collections.abc import Iterator

from service.errors import RequestError
from service.errors import ServiceError
from service.errors import StartupError

INTRODUCTION = """\
# Errors

<!-- Made by `python -m service.web.errors_reference > docs/errors.md`; a test compares. -->

Every error that Moorage raises on purpose is in `service/errors.py`, names the thing, the fact
and the way out, and has one JSON shape:

```json
{"error": {"message": "...", "type": "...", "param": null, "code": "...",
           "failure_class": "F1", "tensors": ["lm_head.weight"], "hint": "..."}}
```

`failure_class`, `tensors` and `hint` are there where they apply. An unexpected error is logged
with its traceback and the request's id, and answered with status 500 and that id, without
details. In a stream that has begun, an error is an event `data: {"error": {...}}`, and no
`[DONE]` follows.

## When the server starts

These end the server, as one line in the log, with an exit status (see
[operations.md](operations.md)); with `fallback` the next strategy is tried instead.
`GET /placement` shows them in `error` and `attempts`.
"""
REQUESTS = """
## When a request is answered

What a drift of the placement is, and what the server then does, is in
[operations.md](operations.md); what a forbidden host is about, in [security.md](security.md).
"""
END = """
## Failure classes

The ways in which a placement goes wrong, F1 to F22: what the libraries say, why, where Moorage
sees it and how to mend it are in [failures.md](failures.md).
"""


def markdown() -> str:
    """docs/errors.md."""
    starting = [
        f"| `{kind.__name__}` | `{kind.code}` | {kind.exit_status} | {_when(kind)} |"
        for kind in kinds(StartupError)
    ]
    asking = [
        f"| `{kind.__name__}` | {kind.status} | `{kind.code}` | {_when(kind)} |"
        for kind in kinds(RequestError)
    ]
    started = ["| error | code | exit status | when |", "| --- | --- | --- | --- |", *starting]
    asked = ["| error | status | code | when |", "| --- | --- | --- | --- |", *asking]
    tables = ["\n".join(table) for table in (started, asked)]
    return f"{INTRODUCTION}\n{tables[0]}\n{REQUESTS}\n{tables[1]}\n{END}"


def kinds(base: type[ServiceError]) -> Iterator[type[ServiceError]]:
    """All kinds of an error, in the order of the file, those of a kind behind it."""
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def _when(kind: type[ServiceError]) -> str:
    """The first paragraph of its docstring, without the full stop."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()).removesuffix(".")


if __name__ == "__main__":
    sys.stdout.write(markdown())
