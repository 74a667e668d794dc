"""The proof: every tensor accounted for, the failure classes checked, one traced forward.

Each check is a function of the loaded model that returns how many things it looked at and raises
PlacementMismatch, naming tensors and the way out. A strategy can add to them (`validate`) and
declare what is intended (`placement.allows`); it cannot switch them off.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from typing import Any

from service.errors import PlacementMismatch
from service.errors import ServiceError
from service.placement import finding
from service.placement.checks import CHECKS
from service.placement.checks import CheckFunction
from service.placement.checks import device_bytes
from service.placement.checks import quantized_linears
from service.placement.loading import Loaded
from service.placement.tensors import Owner
from service.placement.tensors import offload_owners


@dataclass(frozen=True)
class Check:
    """The outcome of one check: `status` is "pass" or "fail", `checked` how many things it looked
    at.
    """

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
    """All checks of one loaded model. Valid when every one passed."""

    checks: tuple[Check, ...]
    issued_at: str
    devices: Mapping[str, int]
    quantized_linears: int

    @property
    def valid(self) -> bool:
        return all(check.status == "pass" for check in self.checks)

    def failure(self) -> ServiceError | None:
        """The first failed check's error."""
        return next((check.error for check in self.checks if check.error is not None), None)

    def as_dict(self) -> dict[str, Any]:
        """The `certificate` object of GET /placement. `devices` has bytes of tensors per device."""
        return {
            "valid": self.valid,
            "issued_at": self.issued_at,
            "devices": dict(self.devices),
            "quantized_linears": self.quantized_linears,
            "checks": [check.as_dict() for check in self.checks],
        }


def certify(loaded: Loaded) -> Certificate:
    """Run every check and return the certificate, valid or not. Takes one forward and a few ms.

    After the first failure the forward is not run: with a tensor missing it would compute garbage,
    and the named tensors say more.
    """
    owners = offload_owners(loaded.model)
    checks: list[Check] = []
    for name, check in CHECKS:
        if name in ("inputs", "forward") and any(c.status == "fail" for c in checks):
            continue
        checks.append(_run(name, check, loaded, owners))
    return Certificate(
        tuple(checks),
        datetime.now(UTC).isoformat(timespec="seconds"),
        device_bytes(loaded, owners),
        len(quantized_linears(loaded)),
    )


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
