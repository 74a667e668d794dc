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
from pydantic import StringConstraints
from pydantic import WithJsonSchema
from pydantic import field_validator
from pydantic import model_serializer

from service.config.address import check_bind
from service.config.address import check_origin
from service.config.api_key import ApiKey
from service.config.api_key import KeyName
from service.config.flags import Flags
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
WebOrigin = Annotated[str, AfterValidator(check_origin)]
DeploymentName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
]
DeviceName = Annotated[str, StringConstraints(pattern=r"^(cuda:(0|[1-9][0-9]{0,2})|cpu|disk)$")]
DeviceOrKind = Annotated[
    str, StringConstraints(pattern=r"^(cuda(:(0|[1-9][0-9]{0,2}))?|cpu|disk)$")
]
Quantize = Literal["none", "nf4", "fp4", "int8", "int4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
OnNoFit = Literal["refuse", "offload-cpu", "offload-disk"]
OnDrift = Literal["stop", "reload"]


class _Frozen(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class KeyLimits(_Frozen):
    """One entry of `server.key_limits`: what requests with one key may take. None is no limit."""

    concurrent: int | None = Field(None, ge=1, le=1_000_000, description="Requests open at once.")
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="Tokens of prompts and answers together; as many may be used in one burst.",
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
        None,
        description="File with one API key a line, `KEY` or `NAME: KEY`; read again when it "
        "changes. A key in moorage.yaml is an error.",
    )
    key_limits: Mapping[KeyName, KeyLimits] = Field(
        default_factory=dict,
        description="Limits for each API key by its name; those of `default` are for keys without "
        "an entry, for example {default: {concurrent: 8}, batch: {tokens_per_minute: 100000}}.",
    )
    cors_origins: tuple[WebOrigin, ...] = Field(
        (),
        description="Web pages that may use this server from a browser: https://app.example, "
        "or '*' for every page. None by default.",
    )
    log_format: Literal["plain", "json"] = Field(
        "plain", description="Lines of the log, those of requests included."
    )
    metrics_prefix: Literal["moorage", "vllm"] = Field(
        "moorage",
        description="Before the colon in the names of metrics that vLLM has too, "
        "for dashboards made for it.",
    )
    tracing: Literal["off", "on"] = Field(
        "off",
        description="Send an OpenTelemetry span for each request to a collector (OTLP over HTTP); "
        "needs moorage[otel]. OTEL_* variables say where; OTEL_EXPORTER_OTLP_ENDPOINT turns it on "
        "unless this says off.",
    )
    max_body: Bytes = Field(4 * 2**20, description="Largest request body.")
    request_timeout_s: float = Field(
        600.0, gt=0, le=86_400, description="A request that runs longer is ended with 504."
    )
    grace_s: float = Field(
        30.0, ge=5, le=3600, description="Seconds running streams get to finish after SIGTERM."
    )
    control_socket: FilePath | None = Field(
        None,
        description="Unix socket on which `moorage reload` reaches the running server, in a folder "
        "that only its user may enter. Default: below $XDG_RUNTIME_DIR/moorage, named by the "
        "address.",
    )
    unknown_fields: Literal["ignore", "refuse"] = Field(
        "ignore",
        description="Request fields that nobody specifies: "
        "named in x-moorage-ignored, or refused with 400.",
    )


class FallbackStep(_Frozen):
    """One entry of `fallback`: a strategy, and what is different from the deployment with it.

    What it does not say is None here, and as in the deployment there.
    """

    strategy: str = Field(min_length=1, description="The strategy to try.")
    quantize: Quantize | None = Field(None, description="Weight format of this attempt.")
    max_context: int | None = Field(None, ge=1, description="Tokens of one sequence.")
    max_sequences: int | None = Field(
        None, ge=1, le=65_536, description="Sequences that run at once."
    )
    on_no_fit: OnNoFit | None = Field(
        None, description="What to do when the devices are too small for it."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _said(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("is empty; give a value or leave it out")
        return value

    @model_serializer
    def _plain(self) -> str | dict[str, Any]:
        return {"strategy": self.strategy, **self.changes} if self.changes else self.strategy

    @property
    def changes(self) -> dict[str, Any]:
        """What it says beside the strategy, by the deployment's keys."""
        said = {key: getattr(self, key) for key in type(self).model_fields if key != "strategy"}
        return {key: value for key, value in said.items() if value is not None}


def named_step(value: Any) -> Any:
    """The name of a strategy alone becomes an entry of `fallback`; the rest is unchanged."""
    return {"strategy": value} if isinstance(value, str) else value


Step = Annotated[
    FallbackStep, BeforeValidator(named_step, json_schema_input_type=str | FallbackStep)
]


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
    fallback: tuple[Step, ...] = Field(
        (),
        description="Tried in order, each in a clean state, when `strategy` cannot be planned, "
        "loaded, proven or started: names of strategies, or steps with values of their own, "
        "for example [{strategy: auto-shard, quantize: nf4}, cpu].",
    )
    quantize: Quantize = Field(
        "none",
        description="Weight format: bitsandbytes nf4, fp4 (4-bit) or int8; "
        "under strategy cpu int8 and int4 are formats of its own.",
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
        "KV is reserved for max_context x max_sequences tokens, or for kv_tokens.",
    )
    kv_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of KV cache for all sequences together, max_context or more: less than "
        "max_context x max_sequences when sequences seldom use their whole context. On the CPU "
        "only whole contexts count: kv_tokens // max_context sequences run at once.",
    )
    compile: bool = Field(
        False,
        description="Run what torch.compile makes of the model: faster, and ready a minute later. "
        "For a model that is whole on one device and not quantised.",
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
    idle_unload_s: float = Field(
        0.0,
        ge=0,
        le=10_000_000,
        description="After so many seconds without a request the model is released; the next "
        "request loads and proves it again, and waits for it. 0 never does.",
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
    file. `flags` are what it was read with. `path` is absolute, and None for the embedded default.
    All paths are absolute.
    """

    path: Path | None
    name: str
    server: ServerConfig
    deployment: DeploymentConfig
    origins: Mapping[str, Origin]
    notices: tuple[str, ...] = ()
    deployments: tuple[str, ...] = ()
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "moorage")
    api_keys: tuple[ApiKey, ...] = ()
    flags: Flags = field(default_factory=Flags)
