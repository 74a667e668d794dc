"""The proof: every tensor accounted for, the failure classes checked, one traced forward.

Each check is a function of the loaded model that returns how many things it looked at and raises
PlacementMismatch, naming tensors and the way out. A strategy can add to them (`validate`) and
declare what is intended (`placement.allows`); it cannot switch them off.
"""

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from datetime import UTC
from datetime import datetime
from typing import Any

from service import __version__
from service.errors import PlacementMismatch
from service.errors import ServiceError
from service.placement import describe
from service.placement import finding
from service.placement import guard
from service.placement.checks import CHECKS
from service.placement.checks import CheckFunction
from service.placement.checks import device_bytes
from service.placement.checks import quantized_linears
from service.placement.loading import Loaded
from service.placement.tensors import Owner
from service.placement.tensors import offload_owners

# what a certificate may cost: this share of the load, or so many seconds where that is more
MOST_SHARE = 0.05
MOST_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """The outcome of one check: "pass" or "fail", and how many things it looked at."""

    name: str
    status: str
    checked: int
    seconds: float
    error: ServiceError | None = None

    def as_dict(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "class": self.name,
            "status": self.status,
            "checked": self.checked,
            "ms": round(self.seconds * 1000, 1),
        }
        if self.error is not None:
            body["message"] = self.error.message
        return body


@dataclass(frozen=True)
class Certificate:
    """All checks of one loaded model. Valid when every one passed.

    devices: bytes of tensors per device. seconds: what all of it took, load_seconds: what the load
    had taken. versions: of what loaded and
    judged the model. plan_hash: of the placement that was carried out. plan_errors: device -> bytes
    of tensors more (or less) than its plan said, for the devices whose weights were planned.
    """

    checks: tuple[Check, ...]
    issued_at: str
    devices: Mapping[str, int]
    quantized_linears: int
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    plan_hash: str | None = None
    plan_errors: Mapping[str, int] = field(default_factory=dict)
    load_seconds: float = 0.0

    @property
    def budget_seconds(self) -> float:
        """What a certificate may cost: a share of the load, or MOST_SECONDS where that is more."""
        return max(MOST_SECONDS, MOST_SHARE * self.load_seconds)

    @property
    def valid(self) -> bool:
        return all(check.status == "pass" for check in self.checks)

    def failure(self) -> ServiceError | None:
        """The first failed check's error."""
        return next((check.error for check in self.checks if check.error is not None), None)

    def as_dict(self) -> dict[str, Any]:
        """The `certificate` object of GET /placement.

        Bytes per device in `devices` and `plan_error_bytes`. `tensors_sampled`: how many were
        compared with the checkpoint.
        """
        sampled = sum(check.checked for check in self.checks if check.name == "F16")
        return {
            "valid": self.valid,
            "issued_at": self.issued_at,
            "seconds": round(self.seconds, 3),
            "load_seconds": round(self.load_seconds, 3),
            "budget_seconds": round(self.budget_seconds, 3),
            "versions": dict(self.versions),
            "plan_hash": self.plan_hash,
            "devices": dict(self.devices),
            "plan_error_bytes": dict(self.plan_errors),
            "quantized_linears": self.quantized_linears,
            "tensors_sampled": sampled,
            "checks": [check.as_dict() for check in self.checks],
        }


def certify(loaded: Loaded) -> Certificate:
    """Run every check and return the certificate, valid or not. Takes one forward and a few ms.

    After the first failure the forward is not run: with a tensor missing it would compute garbage,
    and the named tensors say more.
    """
    started = time.monotonic()
    owners = offload_owners(loaded.model)
    checks: list[Check] = []
    with guard.LOAD_LOCK:  # another load swaps what F4 looks at, and what a forward may need (F5)
        for name, check in CHECKS:
            if name in ("inputs", "forward") and any(c.status == "fail" for c in checks):
                continue
            checks.append(_run(name, check, loaded, owners))
    measured = device_bytes(loaded, owners)
    quantized = len(quantized_linears(loaded))
    return Certificate(
        tuple(checks),
        datetime.now(UTC).isoformat(timespec="seconds"),
        measured,
        quantized,
        time.monotonic() - started,
        versions(quantized=quantized > 0),
        describe.plan_hash(loaded.placement),
        describe.plan_errors(loaded.placement, measured),
        loaded.seconds,
    )


def versions(*, quantized: bool) -> dict[str, str]:
    """Versions of what a load depends on; bitsandbytes only where it was used."""
    packages = ["torch", "transformers", "accelerate", *(["bitsandbytes"] if quantized else [])]
    return {
        "moorage": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _run(
    name: str,
    check: CheckFunction,
    loaded: Loaded,
    owners: Mapping[str, Owner],
) -> Check:
    started = time.monotonic()
    try:
        checked = check(loaded, owners)
    except ServiceError as error:
        return Check(name, "fail", 0, time.monotonic() - started, error.bare())
    except Exception as error:  # a plugin's model may raise anything when it is looked at or run
        failure = PlacementMismatch(
            f"strategy {loaded.strategy.name}: {name} check raised {finding.describe(error)}",
            failure_class=name if name.startswith("F") else None,
        )
        return Check(name, "fail", 0, time.monotonic() - started, failure)
    return Check(name, "pass", checked, time.monotonic() - started)
