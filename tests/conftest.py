"""What every test runs with."""

import gc
import importlib.util
import os

from service.config.compute_threads import compute_environment

# Before torch is imported, here and in every process that a test starts: what a server sets for
# itself on two cores. Several test processes whose idle threads spin take twice as long.
for name, value in compute_environment(2).items():
    os.environ.setdefault(name, value)

# A machine that stalls is no property of what is tested. (tests/gpu run without hypothesis, too.)
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck
    from hypothesis import settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("patient", deadline=None, suppress_health_check=slow)
    settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """What the test modules imported is no garbage: some 500,000 objects that every load of a
    model would otherwise look at several times, for its memory and to collect.
    """
    gc.collect()
    gc.freeze()
