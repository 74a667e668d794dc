"""Hold one strategy to every check of the contract, without pytest."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Literal

from service.errors import PluginError
from service.errors import ServiceError
from service.placement import finding
from service.testing.case import Case
from service.testing.case import NotRun
from service.testing.case import find
from service.testing.case import small_model
from service.testing.contract import CHECKS
from service.testing.contract import said


@dataclass(frozen=True)
class Result:
    """The outcome of one check. "skip" is for what cannot be run on this machine."""

    check: str
    status: Literal["pass", "fail", "skip"]
    message: str


def examine(
    name_or_file: str,
    workspace: Path,
    *,
    model: str | None = None,
    strategy_dirs: Sequence[Path] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[Result]:
    """Every check of the strategy of that name or in that file; a broken one fails the first.

    workspace, settings: see Case. model: a folder, or an architecture of which a tiny model is
    made, else a tiny Llama. Raises UnknownStrategy, UnknownModel.
    """
    try:
        strategy = find(name_or_file, strategy_dirs)
    except PluginError as error:
        return [Result("is-a-strategy", "fail", error.one_line())]
    folder = None if model is None else small_model(model, workspace)
    return list(run(Case(strategy, workspace, model=folder, settings=settings)))


def run(case: Case) -> Iterator[Result]:
    """Every check, in order; a check that fails stops no other."""
    for name, check in CHECKS:
        try:
            yield Result(name, "pass", check(case))
        except NotRun as reason:
            yield Result(name, "skip", str(reason))
        except ServiceError as error:
            yield Result(name, "fail", said(case, error.one_line()))
        except Exception as error:  # a plugin's model may raise anything when it is looked at
            yield Result(name, "fail", f"raised {finding.describe(error)}")
    case.drop()
