"""How many threads compute, and what oneDNN may keep: decided before torch is imported."""

import os
from pathlib import Path

KEPT_KERNELS = 64
"""oneDNN makes a kernel for each shape of a product, of 0.5 to 3 MB, and would keep 1,024."""


def compute_environment(cores: int) -> dict[str, str]:
    """Defaults for the variables that OpenMP and oneDNN read once, when torch is imported.

    One core is left to HTTP, and idle threads sleep instead of spinning: with every core
    computing, a step takes five times as long as soon as anything else wants one of them, because
    libgomp spins at each of some 300 barriers a step.

    Kernels are kept in two caches, oneDNN's and that of ideep, which lies between it and torch.
    Prompts have all lengths, so that with 1,024 places a process grows by a gigabyte while it
    serves. 64 hold what a few sizes of a batch use again and again.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, cores - 1)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KEPT_KERNELS),
        "LRU_CACHE_CAPACITY": str(KEPT_KERNELS),
    }


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
