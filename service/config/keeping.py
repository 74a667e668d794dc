"""A configuration as JSON, for the worker that follows one that was reloaded."""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import TypeAdapter

from service.config.api_key import ApiKey
from service.config.schema import Config

_CONFIG = TypeAdapter(Config)


def to_json(config: Config) -> bytes:
    """All of it but the API keys."""
    return _CONFIG.dump_json(replace(config, api_keys=()))


def from_json(document: bytes, api_keys: Sequence[ApiKey]) -> Config:
    """What `to_json` wrote, with these keys. Raises ValueError if it is anything else."""
    return replace(_CONFIG.validate_json(document), api_keys=tuple(api_keys))
