"""A placement in JSON: what was asked for and tried, its hash, its devices and their bytes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

from service.config.origin import Origin
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ModelConfig
from service.errors import ServiceError
from service.placement.hardware import Hardware
from service.placement.plan import Placement
from service.placement.plan import groups
from service.placement.why import reason

if TYPE_CHECKING:
    from service.placement.certificate import Certificate
    from service.placement.registry import Strategy
    from service.placement.watch import Watch

# the `watch` object of GET /placement before there is a watch, or without one
NOT_WATCHED: dict[str, Any] = {"enabled": False, "checked_at": None, "checks": 0, "findings": []}
# a plan that is further off than this share of a device's weights is worth a warning
TOLERANCE = 0.05


@dataclass(frozen=True)
class Attempt:
    """A strategy that was tried and refused.

    words: the deployment as it was to run. stage: what failed: "import", "select" or "options" of
    the strategy, "plan", "load", "certificate", "validate", "place_inputs", or the "start" of the
    engine.
    """

    words: DeploymentConfig
    stage: str
    error: ServiceError
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        words = self.words
        return {
            "strategy": words.strategy,
            "quantize": words.quantize,
            "max_context": words.max_context,
            "max_sequences": words.max_sequences,
            "on_no_fit": words.on_no_fit,
            "stage": self.stage,
            "seconds": round(self.seconds, 2),
            "error": self.error.as_dict(),
        }


def asked(
    config: Config,
    model: ModelConfig | None,
    strategy: "Strategy | None",
    placement: Placement | None,
    origins: Mapping[str, Origin],
) -> dict[str, Any]:
    """What runs and who said so; the rest is null until it is known.

    origins: of the step of the chain that runs.
    """
    keys = type(config.deployment).model_fields
    return {
        "deployment": config.name,
        "model": {
            "id": model.model_id if model else config.deployment.model,
            "parameters": placement.parameters if placement else None,
            "dtype": placement.dtype if placement else None,
            "quantize": (model or config.deployment).quantize,
            "max_context": placement.context if placement else None,
        },
        "strategy": {
            "name": strategy.name if strategy else (model or config.deployment).strategy,
            "source": strategy.source if strategy else None,
        },
        "origin": {
            key: str(origin)
            for key, origin in origins.items()
            if key in keys and origin.layer != "built-in"
        },
    }


def devices(
    placement: Placement | None,
    hardware: Hardware | None,
    certificate: "Certificate | None" = None,
) -> list[dict[str, Any]]:
    """The `devices` list of GET /placement; without a certificate nothing has been measured.

    modules: groups of neighbours, and `each` of them in order. reason: why they are there, said of
    any of them.
    """
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
            entry["overhead_parts"] = dict(planned.parts)
        entry["measured"] = measured.get(device)
        entry["plan_error_bytes"] = certificate.plan_errors.get(device) if certificate else None
        entry["modules"] = [
            {
                "name": group.name,
                "count": group.count,
                "bytes": group.bytes,
                "each": [{"weights": unit.weights, "kv": unit.kv} for unit in group.units],
            }
            for group in modules.get(device, [])
        ]
        if planned is not None and entry["modules"]:
            entry["reason"] = reason(device, hardware, placement)
        found.append(entry)
    return found


def certified(certificate: "Certificate | None", watch: "Watch | None") -> dict[str, Any] | None:
    """The `certificate` object of GET /placement: valid until the watch has found a change.

    unchanged_until: when the model was last seen to be what was proven. revoked: what changed.
    """
    if certificate is None:
        return None
    changed = watch.error() if watch is not None else None
    seen = watch.as_dict()["unchanged_until"] if watch is not None else certificate.issued_at
    return {
        **certificate.as_dict(),
        "valid": certificate.valid and changed is None,
        "unchanged_until": seen,
        "revoked": changed.message if changed is not None else None,
    }


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
    """Bytes now: by torch's allocator on accelerators, elsewhere of the tensors."""
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


def plan_hash(placement: Placement) -> str:
    """SHA-256 of what decides where and how the model goes; the same in every process.

    Of devices, module map, planned bytes and load arguments; not of the notes.
    """
    facts = {
        "devices": list(placement.devices),
        "main_device": placement.main_device,
        "module_map": dict(placement.module_map),
        "memory": {
            device: [memory.weights, memory.kv, memory.overhead]
            for device, memory in placement.memory.items()
        },
        "load_kwargs": dict(placement.load_kwargs),
        "allows": sorted(placement.allows),
        "quantized": placement.quantized,
        "packed": placement.packed,
        "dtype": placement.dtype,
        "context": placement.context,
        "kv_tokens": placement.kv_tokens,
    }
    text = json.dumps(_plain(facts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Load arguments as JSON, without anything that differs from process to process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(_plain(item)) for item in value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "to_dict"):  # a quantisation config
        return _plain(value.to_dict())
    text = str(value)  # a dtype, a path; an address in memory would say nothing
    return type(value).__qualname__ if " at 0x" in text else text


def plan_errors(placement: Placement, measured: Mapping[str, int]) -> dict[str, int]:
    """Device -> bytes of tensors measured there less the weights planned for it."""
    return {
        device: measured.get(device, 0) - planned.weights
        for device, planned in placement.memory.items()
        if planned.weights or measured.get(device)
    }


def plan_warnings(placement: Placement, errors: Mapping[str, int]) -> list[str]:
    """A sentence for every device whose weights are off by more than TOLERANCE of the plan."""
    return [
        f"{device} holds {abs(error):,} bytes of weights {'more' if error > 0 else 'less'} than "
        f"planned ({placement.memory[device].weights:,})"
        for device, error in errors.items()
        if abs(error) > TOLERANCE * placement.memory[device].weights
    ]
