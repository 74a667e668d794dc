"""This machine, or an invented one, as plain data."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.config.schema import parse_bytes

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator; bytes of device memory as the driver reports them."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int

    @property
    def id(self) -> str:
        """torch's name of the device."""
        return f"cuda:{self.index}"


@dataclass(frozen=True)
class Cpu:
    """Host processor and memory. `bfloat16` says whether it multiplies bfloat16 natively."""

    total_bytes: int
    free_bytes: int
    cores: int = 1
    bfloat16: bool = False


@dataclass(frozen=True)
class Hardware:
    """Everything a strategy may know about the machine; plans depend on nothing else."""

    cpu: Cpu
    gpus: tuple[Gpu, ...] = ()
    disk_free_bytes: int = 0


def detect(offload_folder: Path) -> Hardware:
    """This machine. Starts CUDA: never call it in a process that forks afterwards.

    `offload_folder` (or its nearest existing parent) is where the free disk space is measured.
    """
    import psutil
    import torch

    gpus: list[Gpu] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            gpus.append(Gpu(index, torch.cuda.get_device_name(index), total, free))
    memory = psutil.virtual_memory()
    limit, used = _cgroup_memory()
    total = min(memory.total, limit)
    free = min(memory.available, limit - used)
    cores = psutil.cpu_count(logical=False) or 1
    cpu = Cpu(total, free, cores, _native_bfloat16())
    folder = next(p for p in (offload_folder, *offload_folder.absolute().parents) if p.exists())
    return Hardware(cpu, tuple(gpus), psutil.disk_usage(str(folder)).free)


def invent(text: str) -> Hardware:
    """Hardware from words: "2x24GiB", "24GiB,80GiB,ram=64GiB", "ram=16GiB,disk=1TiB".

    A part without a name is a GPU (COUNTxSIZE or SIZE); the driver's share, 0.5 GiB each, is taken
    off as in a fresh process. RAM defaults to 64 GiB and disk to 1 TiB, all free. Raises
    ValueError for anything else.
    """
    gpus: list[Gpu] = []
    ram, disk = 64 * GIB, 1024 * GIB
    for part in (p.strip() for p in text.split(",")):
        name, equals, size = part.partition("=")
        if equals and name in ("ram", "disk"):
            if name == "ram":
                ram = _size(size)
            else:
                disk = _size(size)
            continue
        match = re.fullmatch(r"(?:(\d{1,3})x)?(\d.*)", part)
        if equals or match is None or match[1] in ("0", "00", "000"):
            raise ValueError(f"cannot read {part!r}; write for example 2x24GiB,ram=64GiB,disk=1TiB")
        total = _size(match[2])
        for _ in range(int(match[1] or 1)):
            gpus.append(
                Gpu(len(gpus), f"{total / GIB:.0f} GiB GPU", total, max(0, total - GIB // 2))
            )
    return Hardware(Cpu(ram, ram, cores=8, bfloat16=True), tuple(gpus), disk)


def _size(text: str) -> int:
    size = parse_bytes(text)
    if not isinstance(size, int) or size <= 0:
        raise ValueError(f"{text!r} is not a size; write for example 24GiB")
    return size


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """The container's memory limit and what it uses, in bytes (cgroup v2, v1); no limit is 2**63.

    Page cache that can be dropped does not count as used.
    """
    v2 = (root / "memory.max", root / "memory.current", root / "memory.stat", "inactive_file")
    v1_root = root / "memory"
    v1 = (
        v1_root / "memory.limit_in_bytes",
        v1_root / "memory.usage_in_bytes",
        v1_root / "memory.stat",
        "total_inactive_file",
    )
    for limit, used, stat, cache in (v2, v1):
        try:
            most = limit.read_text().strip()
            now = int(used.read_text())
            facts = dict(line.split() for line in stat.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit() and int(most) < 2**60:  # v2 writes "max" for none, v1 an absurd number
            return int(most), max(0, now - int(facts.get(cache, 0)))
    return 2**63, 0


def _native_bfloat16() -> bool:
    """Whether bf16 matrix products run natively; emulated ones are slower than float32."""
    import torch

    checks: Sequence[str] = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, name, lambda: False)() for name in checks):
        return True
    return os.uname().machine in ("arm64", "aarch64") and "bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
