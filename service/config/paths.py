"""Relative paths: those of a file are meant from its folder, all others from where we are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from service.config.address import under
from service.config.layers import Setting


def absolute(setting: Setting, folder: Path) -> Setting:
    """The setting with its paths absolute: `folder` before relative ones, "~" written out.

    Raises ValueError when a home folder is meant that does not exist.
    """
    try:
        return replace(setting, value=_absolute(setting.key, setting.value, folder))
    except RuntimeError:
        raise ValueError(f"{setting.key} is in a home folder that does not exist") from None


def _absolute(key: str, value: Any, folder: Path) -> Any:
    if value is None:
        return None
    if key in ("server.api_keys_file", "server.control_socket", "offload_folder"):
        return _below(folder, value)
    if key == "strategy_dirs":
        return [_below(folder, item) for item in value]
    if key == "server.bind":
        return under(value, folder)
    if key == "model" and _is_path(value, folder):
        return _below(folder, value)
    return value


def _below(folder: Path, text: str) -> str:
    return str(folder / Path(text).expanduser())


def _is_path(model: str, folder: Path) -> bool:
    """Whether a model's name means a folder (or a GGUF file in one) and not a hub id."""
    if model in (".", "..") or model.startswith(("./", "../", "~")):
        return True
    holder = model.rpartition(":")[0] if model.endswith(".gguf") else ""
    return any(name and _is_there(folder / name) for name in (model, holder))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or not allowed to look
        return False
