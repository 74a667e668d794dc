"""`gunicorn -c gunicorn.conf.py`: the same server as `moorage serve`, from the same moorage.yaml.

Read by the gunicorn master, which never imports torch. What may be changed is in moorage.yaml and
in MOORAGE_* variables; what gunicorn's own command line must not change is refused at start.
"""

import sys

from service.config.flags import Flags
from service.config.gunicorn_options import settings
from service.config.reading import load_process
from service.errors import ServiceError

try:
    globals().update(settings(load_process(Flags())))
except ServiceError as error:
    sys.stderr.write(f"{error}\n" if error.hint is None else f"{error}\nfix: {error.hint}\n")
    sys.exit(error.exit_status)
