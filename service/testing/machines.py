"""Invented machines: a plan takes the hardware as an argument, so it can be tested anywhere.

Sizes are in bytes, all of it free. They are what a model may use: what CUDA's libraries take of
every card, and oneDNN of a machine without one, comes on top.
"""

from service.placement.hardware import GIB as GIB
from service.placement.hardware import Cpu
from service.placement.hardware import Gpu
from service.placement.hardware import Hardware
from service.placement.overhead import CPU_KERNELS
from service.placement.overhead import FIXED

MIB = 2**20


def ram(size: int, *, disk: int = 1024 * GIB) -> Hardware:
    """A machine without a GPU."""
    size += CPU_KERNELS
    return Hardware(Cpu(size, size, bfloat16=True), (), disk)


def cards(*sizes: int, ram: int = 64 * GIB, disk: int = 1024 * GIB) -> Hardware:
    """A machine with GPUs of these sizes."""
    gpus = tuple(Gpu(index, "card", size + FIXED, size + FIXED) for index, size in enumerate(sizes))
    return Hardware(Cpu(ram, ram, bfloat16=True), gpus, disk)


def empty() -> Hardware:
    """A machine on which no model fits: 64 KiB of memory, no GPU, no disk."""
    return Hardware(Cpu(2**16, 2**16))
