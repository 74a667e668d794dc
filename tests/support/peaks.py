"""The most bytes that torch's CPU allocator held at once while something ran.

    peak = peak_bytes(lambda: model(**inputs))

Counts every tensor made meanwhile, those inside kernels too; what a library keeps for itself
(oneDNN's scratch, Python) is not seen.
"""

from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """Run once and return the highest number of bytes held beyond what was held before."""
    with (
        torch.inference_mode(),
        torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile,
    ):
        kept = run()
    del kept
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
