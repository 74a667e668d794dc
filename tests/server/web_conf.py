"""gunicorn.conf.py of tests: by default the web room around a fake engine.

MOORAGE_* variables configure it, TEST_APP names another app, and TEST_SOCKET_SECONDS shortens how
long clients may take; `patience` has more. TEST_ALL_THREADS starts every thread that requests
can ever use before the first one comes, so that what is in use can be compared.
"""

import os
import threading

from service.config.flags import Flags
from service.config.gunicorn_options import settings
from service.config.reading import load_process
from tests.server import patience

patience.apply()
globals().update(
    settings(
        load_process(Flags()), socket_seconds=float(os.environ.get("TEST_SOCKET_SECONDS", "20"))
    )
)
wsgi_app = os.environ.get("TEST_APP", "tests.server.web_app:build")
certfile = os.environ.get("TEST_CERTIFICATE")

if os.environ.get("TEST_ALL_THREADS"):
    _post_worker_init = globals()["post_worker_init"]

    def post_worker_init(worker):  # type: ignore[no-untyped-def]
        """Each thread waits for all others: none can do the work of two."""
        all_of_them = threading.Barrier(worker.cfg.threads)
        list(worker.tpool.map(lambda _: all_of_them.wait(), range(worker.cfg.threads)))
        _post_worker_init(worker)
