"""How many threads compute, decided before torch is imported."""

import os
from pathlib import Path


def compute_environment(cores: int) -> dict[str, str]:
    """Defaults for the variables that OpenMP reads once, when torch is imported.

    One core is left to HTTP, and idle threads sleep instead of spinning: with every core
    computing, a step takes five times as long as soon as anything else wants one of them, because
    libgomp spins at each of some 300 barriers a step.
    """
    return {"OMP_NUM_THREADS": str(max(1, cores - 1)), "OMP_WAIT_POLICY": "PASSIVE"}


def usable_cores() -> int:
    """Physical cores this process may use, by its affinity and its container's quota."""
    import psutil

    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed, _quota() or physical))


def _quota() -> int | None:
    """Whole cores of the container's CPU quota (cgroup v2), or None where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return None
