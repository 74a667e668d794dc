"""What the shell offers after Tab. Reads names only: no strategy is imported, and never torch.

Nothing is offered where nothing can be said, for example because the config has a mistake: a
message would appear in the middle of the line that is being typed.
"""

from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path

import typer

from service.config import reading
from service.config.environment import process_environment
from service.config.flags import Flags
from service.errors import ConfigError
from service.errors import ServiceError

Offer = Callable[[typer.Context, str], list[str]]


def _offered(names: Callable[[Flags], Iterable[str]]) -> Offer:
    """A completion of those of the names that begin with what is typed."""

    def offer(ctx: typer.Context, incomplete: str) -> list[str]:
        config = ctx.params.get("config")
        flags = Flags(Path(config) if config else None, ctx.params.get("deployment"))
        try:
            return sorted(name for name in names(flags) if name.startswith(incomplete))
        except (ServiceError, OSError, RuntimeError):
            return []

    return offer


def _deployments(flags: Flags) -> Iterable[str]:
    from service.config import file_layers

    path = reading.find(process_environment(), flags)
    return () if path is None else file_layers.read(path).deployments


def _strategies(flags: Flags) -> Iterable[str]:
    from service.placement import finding

    try:
        folders = reading.load_process(flags).deployment.strategy_dirs
    except ConfigError:
        folders = ()  # the built-in and installed ones can be said all the same
    return (found.name for found in finding.find(folders))


def _models(flags: Flags) -> Iterable[str]:
    from service.models.catalogue import CATALOGUE

    return CATALOGUE


def _keys(flags: Flags) -> Iterable[str]:
    from service.config import text_values

    keys = (*text_values.deployment_keys(), *text_values.server_keys())
    return (f"{key}=" for key in keys)


def _formats(flags: Flags) -> Iterable[str]:
    from typing import get_args

    from service.config.schema import Quantize

    return get_args(Quantize)


deployments = _offered(_deployments)
strategies = _offered(_strategies)
models = _offered(_models)
keys = _offered(_keys)
formats = _offered(_formats)
