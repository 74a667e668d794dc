"""DEVICE_MAP and QUANTIZE: what they were called before there was a config file."""

import re
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path

from service.config.layers import Setting
from service.config.origin import Origin
from service.config.suggesting import valid_are
from service.errors import Problem

NEW_NAMES = {"DEVICE_MAP": "MOORAGE_STRATEGY", "QUANTIZE": "MOORAGE_QUANTIZE"}

STRATEGY_NAMES = {
    "auto": "auto-shard",
    "single": "single-gpu",
    "cuda": "single-gpu",
    "gpu": "single-gpu",
    "cpu": "cpu",
}
ONE_DEVICE = re.compile(r"cuda:([0-9]{1,3})")
NO_MAP = ("none", "off")
"""No device map meant: the first accelerator if there is one, else the CPU."""

QUANTIZE_NAMES = {
    "none": "none",
    "4bit": "nf4",
    "nf4": "nf4",
    "bnb-4bit": "nf4",
    "bitsandbytes-nf4": "nf4",
    "fp4": "fp4",
    "8bit": "int8",
    "bnb-8bit": "int8",
    "int8": "int8",
}

DRIVER_LIBRARY_OF_WSL = Path("/usr/lib/wsl/lib/libcuda.so.1")


def accelerator_present(devices: Path = Path("/dev")) -> bool:
    """Whether the NVIDIA driver of this machine offers a GPU, asked without touching it.

    Looks for the driver's device files (nvidia0, nvidia1, ...) or, under WSL, for dxg with the
    driver's library. Initialising CUDA to ask would break processes that fork afterwards.
    """
    if any(re.fullmatch(r"nvidia[0-9]+", entry.name) for entry in devices.glob("nvidia*")):
        return True
    return (devices / "dxg").exists() and DRIVER_LIBRARY_OF_WSL.exists()


def settings(
    env: Mapping[str, str], accelerator: Callable[[], bool]
) -> tuple[list[Setting], list[Problem]]:
    """What the old variables say, as settings of today. An empty value is not set.

    `accelerator` is asked only if DEVICE_MAP leaves the choice to the machine;
    CUDA_VISIBLE_DEVICES that hides every GPU counts as no accelerator.
    """
    found: list[Setting] = []
    problems: list[Problem] = []
    device_map, quantize = (env.get(name, "").strip().lower() for name in NEW_NAMES)
    if device_map:
        origin = Origin("env", "DEVICE_MAP")
        strategy = _strategy(device_map, env, accelerator)
        if strategy is None:
            valid = (*STRATEGY_NAMES, "cuda:N", *NO_MAP)
            problems.append(_unknown("DEVICE_MAP", env, valid))
        else:
            found.append(Setting("strategy", strategy, origin))
            if match := ONE_DEVICE.fullmatch(device_map):
                found.append(Setting("options", int(match[1]), origin, entry="device"))
    if quantize:
        if quantize in QUANTIZE_NAMES:
            origin = Origin("env", "QUANTIZE")
            found.append(Setting("quantize", QUANTIZE_NAMES[quantize], origin))
        else:
            problems.append(_unknown("QUANTIZE", env, tuple(QUANTIZE_NAMES)))
    return found, problems


def notice(name: str, before: Origin, now: Origin) -> str:
    """The sentence for an old variable that is set.

    before: where the value came from below it; now: where it comes from in the end.
    """
    told = f"New name: {NEW_NAMES[name]}."
    if (now.layer, now.name) != ("env", name):
        return f"{name} is set in the environment, but {now} overrides it. {told}"
    if before.layer == "file":
        return f"{name} is set in the environment and overrides {before}. {told}"
    return f"{name} is set in the environment. {told}"


def _strategy(
    device_map: str, env: Mapping[str, str], accelerator: Callable[[], bool]
) -> str | None:
    if device_map in NO_MAP:
        hidden = env.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")
        return "single-gpu" if not hidden and accelerator() else "cpu"
    if ONE_DEVICE.fullmatch(device_map):
        return "single-gpu"
    return STRATEGY_NAMES.get(device_map)


def _unknown(name: str, env: Mapping[str, str], valid: tuple[str, ...]) -> Problem:
    value = env[name].strip()
    return Problem(f"env {name}", "", f"{value!r} is unknown{valid_are(value.lower(), valid)}")
