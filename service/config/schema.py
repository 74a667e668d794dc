"""The typed, frozen values of a configuration. What is not named here is refused.

`moorage config schema` and docs/config.md are generated from the descriptions below.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from decimal import Decimal
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import Literal

from pydantic import AfterValidator
from pydantic import BaseModel
from pydantic import BeforeValidator
from pydantic import ConfigDict
from pydantic import Field
from pydantic import SecretStr
from pydantic import StringConstraints
from pydantic import WithJsonSchema

from service.config.address import check_bind
from service.config.origin import Origin

UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_bytes(value: Any) -> Any:
    """Text such as "1GiB" or "512 MiB" becomes bytes; anything else is returned unchanged.

    Raises ValueError naming the valid units.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]i?B|B)", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size; write a number with one of {', '.join(UNITS)}")
    return int(Decimal(match[1]) * UNITS[match[2]])


SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?B|B)$"},
    ]
}

Bytes = Annotated[
    int, BeforeValidator(parse_bytes), Field(ge=0, le=2**60), WithJsonSchema(SIZE_SCHEMA)
]


def check_path(value: Any) -> Any:
    """A path unchanged. Raises ValueError for empty text, which would mean the current folder."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; give a path")
    return value


FilePath = Annotated[Path, BeforeValidator(check_path)]
Bind = Annotated[str, AfterValidator(check_bind)]
DeploymentName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
]
DeviceName = Annotated[str, StringConstraints(pattern=r"^(cuda:(0|[1-9][0-9]{0,2})|cpu|disk)$")]
DeviceOrKind = Annotated[
    str, StringConstraints(pattern=r"^(cuda(:(0|[1-9][0-9]{0,2}))?|cpu|disk)$")
]
Quantize = Literal["none", "nf4", "fp4", "int8"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
OnNoFit = Literal["refuse", "offload-cpu", "offload-disk"]
OnDrift = Literal["stop", "reload"]


class _Frozen(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class ServerConfig(_Frozen):
    """The `server` block: how HTTP is served."""

    bind: Bind = Field(
        "127.0.0.1:8000",
        description="Address and port, or unix:PATH. Loopback unless you say otherwise.",
    )
    threads: int = Field(
        64, ge=9, le=1024, description="Open requests. Eight are kept for health and placement."
    )
    max_queue: int = Field(
        256,
        ge=0,
        le=100_000,
        description="Sequences that may wait; beyond this 429 with Retry-After.",
    )
    api_keys_file: FilePath | None = Field(
        None, description="File with one API key a line. A key in moorage.yaml is an error."
    )
    max_body: Bytes = Field(4 * 2**20, description="Largest request body.")
    request_timeout_s: float = Field(
        600.0, gt=0, le=86_400, description="A request that runs longer is ended with 504."
    )
    grace_s: float = Field(
        30.0, ge=5, le=3600, description="Seconds running streams get to finish after SIGTERM."
    )
    unknown_fields: Literal["ignore", "refuse"] = Field(
        "ignore",
        description="Request fields that nobody specifies: "
        "named in x-moorage-ignored, or refused with 400.",
    )


class DeploymentConfig(_Frozen):
    """One block of `deployments`: which model, and where it goes."""

    model: str = Field(
        "smollm2-135m",
        min_length=1,
        description="Folder, hub id[@revision], REPO:FILE.gguf, "
        "or a name `moorage model list` knows.",
    )
    strategy: str = Field(
        "cpu", min_length=1, description="The placement strategy: `moorage plugins list`."
    )
    strategy_dirs: tuple[FilePath, ...] = Field(
        (), description="Folders with strategy files of your own."
    )
    options: Mapping[str, Any] = Field(
        default_factory=dict,
        description="Options of the strategy, checked by the strategy's own model.",
    )
    fallback: tuple[str, ...] = Field(
        (),
        description="Strategies tried in order when the first cannot be planned, loaded or proven.",
    )
    quantize: Quantize = Field(
        "none", description="Weight format: bitsandbytes nf4, fp4 (4-bit) or int8."
    )
    dtype: Dtype = Field(
        "auto",
        description="Number format of the weights; auto is the checkpoint's, "
        "or float32 where the device lacks it.",
    )
    max_context: int = Field(
        4096, ge=1, description="Tokens of one sequence, prompt and answer together."
    )
    max_sequences: int = Field(
        8,
        ge=1,
        le=65_536,
        description="Sequences that run at once. "
        "KV is reserved for max_context x max_sequences tokens.",
    )
    on_no_fit: OnNoFit = Field("refuse", description="What to do when the devices are too small.")
    offload_folder: FilePath | None = Field(
        None, description="Folder for weights on disk (offload-disk). Default: below the cache."
    )
    keep_free: Mapping[DeviceOrKind, Bytes] = Field(
        default_factory=dict,
        description="Bytes to leave alone per device or kind of device, for example {cuda: 1GiB}.",
    )
    max_memory: Mapping[DeviceName, Bytes] = Field(
        default_factory=dict,
        description="Most bytes to use per device, for example {cuda:0: 20GiB, cpu: 8GiB}.",
    )
    load_timeout_s: float = Field(1800.0, gt=0, description="A load that takes longer is ended.")
    watch_interval_s: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="Seconds between two looks whether the model is still what was proven; "
        "0 never looks.",
    )
    on_drift: OnDrift = Field(
        "stop",
        description="What to do when it is not: end the process, so that a fresh one loads it, "
        "or load it again in this one.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code found in the model's folder. Off unless you trust it."
    )
    allow_pickle: bool = Field(
        False,
        description="Load pickled weights (.bin), which can run code. Off unless you trust them.",
    )


class ModelConfig(DeploymentConfig):
    """What the hooks of a strategy get: a deployment whose model has been found on this machine.

    `options` holds the validated instance of the strategy's own `Options` model, or the plain
    mapping if it has none. Made by `service.models.locate`; never written by hand in a config.
    """

    deployment: str
    model_id: str
    folder: Path
    gguf_file: str | None = None
    options: Any = None


class FileConfig(_Frozen):
    """A whole moorage.yaml."""

    version: Literal[1] = Field(description="The version of this format: 1.")
    deployment: str | None = Field(
        None,
        min_length=1,
        description="The deployment that runs. "
        "--deployment and MOORAGE_DEPLOYMENT override it; not needed if there is only one.",
    )
    server: ServerConfig = Field(default_factory=ServerConfig, description="How HTTP is served.")
    defaults: DeploymentConfig = Field(
        default_factory=DeploymentConfig, description="Every deployment starts from these."
    )
    deployments: Mapping[DeploymentName, DeploymentConfig] = Field(
        min_length=1, description="Named blocks: which model, and where it goes."
    )


@dataclass(frozen=True)
class Config:
    """A whole configuration: the selected deployment and where every value came from.

    `origins` has a key per value: "server.bind", "model", "strategy", ..., and for what the file
    or a flag says also one per entry: "options.device", "fallback[0]". "deployment", "api_keys"
    and "cache" say where the choice of the deployment, the keys and the cache folder came from.
    `notices` are sentences the operator should see, such as an old variable that overrides the
    file. `path` is absolute, and None for the embedded default. All paths are absolute.
    """

    path: Path | None
    name: str
    server: ServerConfig
    deployment: DeploymentConfig
    origins: Mapping[str, Origin]
    notices: tuple[str, ...] = ()
    deployments: tuple[str, ...] = ()
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "moorage")
    api_keys: tuple[SecretStr, ...] = ()
