"""What every test runs with."""

import gc
import os

from service.config.compute_threads import compute_environment

# Before torch is imported, here and in every process that a test starts: what a server sets for
# itself on two cores. Several test processes whose idle threads spin take twice as long.
for name, value in compute_environment(2).items():
    os.environ.setdefault(name, value)


def pytest_collection_finish() -> None:
    """What the test modules imported is no garbage: some 500,000 objects that every load of a
    model would otherwise look at several times, for its memory and to collect.
    """
    gc.collect()
    gc.freeze()
