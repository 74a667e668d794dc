"""What the trial of one failure class says, and what the trials share."""

import dataclasses
import importlib.util
from collections.abc import Callable

import torch

from service.errors import ServiceError
from service.placement.certificate import Certificate


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`there`: plain libraries still fail so; `caught`: ours notices it.

    there is None where it could not be tried, and `why` says why; then caught is False if the trial
    itself broke, else None. caught is None too where there is nothing left to notice.
    """

    failure_class: str
    what: str
    there: bool | None
    caught: bool | None
    why: str | None = None


class NotTried(Exception):
    """A class that cannot be tried on this machine; the text says why."""


def need(package: str) -> None:
    """Raise NotTried unless the package is installed."""
    if importlib.util.find_spec(package) is None:
        raise NotTried(f"{package} is not installed")


def raises(work: Callable[[], object]) -> bool:
    """Whether `work` fails in one of the ways in which torch, accelerate and transformers do."""
    try:
        with torch.inference_mode():
            work()
    except (RuntimeError, KeyError, ValueError):  # NotImplementedError is a RuntimeError
        return True
    return False


def refused(work: Callable[[], object]) -> set[str]:
    """The classes for which ours refuses: of what `work` raises, or of the certificate it returns.

    Empty if nothing is refused.
    """
    try:
        made = work()
    except ServiceError as error:
        return {error.failure_class or type(error).__name__}
    if not isinstance(made, Certificate):
        return set()
    failed = {check.name for check in made.checks if check.status == "fail"}
    return failed | {
        check.error.failure_class
        for check in made.checks
        if check.error is not None and check.error.failure_class is not None
    }
