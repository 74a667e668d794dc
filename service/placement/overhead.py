"""What a device needs beside weights and KV cache, part by part."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.placement.footprint import Footprint

MIB = 2**20
# share of the weights and KV that allocators lose to rounding and fragmentation
ROUNDING = 0.02
# cuBLAS takes this from torch's allocator at its first product (measured on an H200: 67,108,864)
WORKSPACE = 64 * MIB
# kernels that CUDA loads when they are first called, outside torch's allocator: the context grows
# from what it has at the start, which a device's free bytes are counted without, to 500-600 MiB
KERNELS = 128 * MIB
# both, per card
FIXED = WORKSPACE + KERNELS
# kernels that oneDNN makes for shapes of products: 64 are kept (service/config/compute_threads.py),
# which took 25 MiB, and 75 to 90 more for the holes that the others leave in malloc's heap
CPU_KERNELS = 128 * MIB


def parts(footprint: "Footprint", resident: int, *, on_cuda: bool) -> dict[str, int]:
    """Name -> bytes of overhead on a device that computes; their sum is DeviceMemory.overhead.

    resident: bytes of weights and KV there. Packed copies of weights are weights, not overhead.
    """
    found = {
        "activations": footprint.activations,
        "logits": footprint.logits,
        "rounding": int(resident * ROUNDING),
    }
    if on_cuda:
        return found | {"workspace": WORKSPACE, "kernels": KERNELS}
    return found | {"kernels": CPU_KERNELS}
