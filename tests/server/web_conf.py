"""gunicorn.conf.py of tests: by default the web room around a fake engine.

MOORAGE_* variables configure it, TEST_APP names another app, and TEST_SOCKET_SECONDS shortens how
long clients may take.
"""

import os

from service.config.flags import Flags
from service.config.gunicorn_options import settings
from service.config.reading import load_process

globals().update(
    settings(
        load_process(Flags()), socket_seconds=float(os.environ.get("TEST_SOCKET_SECONDS", "20"))
    )
)
wsgi_app = os.environ.get("TEST_APP", "tests.server.web_app:build")
certfile = os.environ.get("TEST_CERTIFICATE")
