"""A placement in JSON: devices with planned and measured bytes, for /placement and `moorage
plan`.
"""

from typing import TYPE_CHECKING
from typing import Any

from service.placement.hardware import Hardware
from service.placement.plan import Placement
from service.placement.plan import groups

if TYPE_CHECKING:
    from service.placement.certificate import Certificate


def devices(
    placement: Placement | None,
    hardware: Hardware | None,
    certificate: "Certificate | None" = None,
) -> list[dict[str, Any]]:
    """The `devices` list of GET /placement; without a certificate nothing has been measured."""
    if placement is None or hardware is None:
        return []
    measured = _measured(certificate)
    modules = groups(placement)
    found = []
    for device in placement.devices:
        entry: dict[str, Any] = {"id": device, **_facts(hardware, device)}
        planned = placement.memory.get(device)
        if planned is not None:
            entry["planned"] = {
                "weights": planned.weights,
                "kv": planned.kv,
                "overhead": planned.overhead,
            }
        entry["measured"] = measured.get(device)
        entry["modules"] = [
            {"name": group.name, "count": group.count, "bytes": group.bytes}
            for group in modules.get(device, [])
        ]
        found.append(entry)
    return found


def _facts(hardware: "Hardware", device: str) -> dict[str, Any]:
    """Name and bytes of a device, from before the load."""
    for gpu in hardware.gpus:
        if gpu.id == device:
            return {"name": gpu.name, "total": gpu.total_bytes, "free_before": gpu.free_bytes}
    if device == "cpu":
        cpu = hardware.cpu
        return {
            "name": f"{cpu.cores} cores",
            "total": cpu.total_bytes,
            "free_before": cpu.free_bytes,
        }
    return {"name": device, "total": None, "free_before": hardware.disk_free_bytes}


def _measured(certificate: "Certificate | None") -> dict[str, dict[str, int]]:
    """Bytes now: on an accelerator as torch's allocator says, elsewhere the tensors that rest
    there.
    """
    if certificate is None:
        return {}
    import torch

    measured = {device: {"allocated": size} for device, size in certificate.devices.items()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            measured[f"cuda:{index}"] = {
                "allocated": torch.cuda.memory_allocated(index),
                "reserved": torch.cuda.memory_reserved(index),
            }
    return measured
