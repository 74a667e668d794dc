"""What a device needs beside weights and KV cache, part by part."""

from typing import TYPE_CHECKING

from service.placement.kv import CAPTURED_TOKENS
from service.placement.kv import STEP_TOKENS

if TYPE_CHECKING:
    from service.placement.footprint import Footprint

MIB = 2**20
# share of the weights and KV that allocators lose to rounding and fragmentation
ROUNDING = 0.02
# cuBLAS takes this from torch's allocator at its first product (measured on an H200: 67,108,864)
WORKSPACE = 64 * MIB
# kernels that CUDA loads when they are first called, outside torch's allocator, and the nodes of
# captured steps: a device's free bytes are counted after its context exists, which grows from then
# on (measured on an H200: 386 MiB in bfloat16, 398 in nf4; 376 in int8, where nothing is captured)
KERNELS = 416 * MIB
# what captured steps keep in torch's allocator beside their states: their stream's workspace, and
# where attention finds queries and leaves answers
GRAPHS = 64 * MIB
# all, per card
FIXED = WORKSPACE + KERNELS + GRAPHS
# kernels that oneDNN makes for shapes of products: 64 are kept (service/config/compute_threads.py),
# which took 25 MiB, and 75 to 90 more for the holes that the others leave in malloc's heap
CPU_KERNELS = 128 * MIB
# torch's compiler and what it makes, in this process (measured: 300 MiB for SmolLM2-135M)
COMPILER = 384 * MIB


def parts(
    footprint: "Footprint", resident: int, *, whole: bool, on_cuda: bool, compiled: bool
) -> dict[str, int]:
    """Name -> bytes of overhead on a device that computes; their sum is DeviceMemory.overhead.

    resident: bytes of weights and KV there; packed copies of weights are weights, not overhead.
    whole: whether no other device computes, so that steps are captured, whose states lie in memory
    of their own. compiled: whether torch.compile makes the steps, which takes RAM: planned where
    the model is.
    """
    found = {
        "activations": footprint.activations,
        "logits": footprint.logits,
        "rounding": int(resident * ROUNDING),
    }
    if on_cuda:
        graphs = GRAPHS + (_captured(footprint) if whole else 0)
        return found | {"workspace": WORKSPACE, "kernels": KERNELS, "graphs": graphs}
    found["kernels"] = CPU_KERNELS
    if compiled:
        found["compiler"] = COMPILER
    return found


def _captured(footprint: "Footprint") -> int:
    """Bytes of the states of the largest captured step: its share of the largest step's."""
    if footprint.plain or footprint.embeds:
        return 0
    tokens = min(STEP_TOKENS["cuda"], footprint.context * footprint.sequences)
    return footprint.activations * min(CAPTURED_TOKENS, tokens) // tokens
