"""gunicorn.conf.py for the web room around a fake engine; MOORAGE_* variables configure it.

TEST_SOCKET_SECONDS shortens how long clients may take.
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
wsgi_app = "tests.server.web_app:build"
certfile = os.environ.get("TEST_CERTIFICATE")
