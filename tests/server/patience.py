"""How long the server waits at its end, where a test says so: a machine that stalls for seconds may
otherwise take the last event of a stream.

TEST_FLUSH_S: for the last events of streams, whatever began the stop. TEST_RESERVE_S: of the grace,
what is not given to running streams. TEST_LINGER_S: for clients that do not close their side.
TEST_FAREWELL_S: for sending spans.
"""

import os

from service.config import gunicorn_worker

NAMES = {
    "TEST_FLUSH_S": ("FLUSH_SECONDS", "QUICK_FLUSH_SECONDS"),
    "TEST_RESERVE_S": ("RESERVE_SECONDS",),
    "TEST_LINGER_S": ("LINGER_SECONDS",),
    "TEST_FAREWELL_S": ("FAREWELL_SECONDS",),
}


def apply() -> None:
    for variable, names in NAMES.items():
        if variable in os.environ:
            for name in names:
                if not hasattr(gunicorn_worker, name):
                    raise AttributeError(f"{variable}: the worker has no {name} any more")
                setattr(gunicorn_worker, name, float(os.environ[variable]))
