"""The environment: the one place that reads it, and what its variables mean."""

import os
from collections.abc import Mapping


def process_environment() -> Mapping[str, str]:
    """A copy of this process's environment. Nothing else in the service reads os.environ."""
    return dict(os.environ)


def set_missing(variables: Mapping[str, str]) -> None:
    """Set what the operator has not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def forbid_colours() -> None:
    """For this process and those that it starts. Nothing but this and `set_missing` writes
    os.environ.
    """
    os.environ["NO_COLOR"] = "1"
