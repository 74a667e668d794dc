"""A folder to write config files in, and the example of the product's documentation."""

from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path

import pytest

from service.config import reading
from service.config.flags import Flags
from service.config.schema import Config
from service.errors import ConfigError

EXAMPLE = """\
# yaml-language-server: $schema=./moorage.schema.json
version: 1
deployment: laptop              # which block runs; --deployment or MOORAGE_DEPLOYMENT overrides

server:
  bind: 127.0.0.1:8000
  threads: 64                   # open requests; ONE process owns the model
  max_queue: 256                # beyond this: 429 with Retry-After
  api_keys_file: secrets/keys   # or env MOORAGE_API_KEYS; a key in this file is an error

defaults:                       # every deployment starts from these
  max_context: 8192
  max_sequences: 16
  on_no_fit: refuse             # refuse | offload-cpu | offload-disk

deployments:
  laptop:
    model: smollm2-135m         # folder, hub id[@revision], repo:file.gguf, or a known name
    strategy: cpu               # env DEVICE_MAP (old name) overrides this line
  rig:                          # 70B on two 24 GB cards
    model: meta-llama/Llama-3.3-70B-Instruct
    strategy: auto-shard
    quantize: nf4               # env QUANTIZE (old name) overrides this line
    keep_free: {cuda: 1GiB}
  mine:
    model: ./my-model
    strategy: my-strategy
    strategy_dirs: [./strategies]
    options: {first_layers_on_cpu: 4}   # validated by the strategy's own pydantic model
    fallback: [auto-shard, cpu]         # tried in order, each in a clean state, each proven
"""

Load = Callable[..., Config]
Refusal = Callable[..., ConfigError]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def example(folder: Path) -> Path:
    """The documented example as ./moorage.yaml, its key file beside it."""
    (folder / "moorage.yaml").write_text(EXAMPLE)
    (folder / "secrets").mkdir()
    keys = folder / "secrets" / "keys"
    keys.write_text("first-key\n")
    keys.chmod(0o600)
    return Path("moorage.yaml")


@pytest.fixture
def load(folder: Path) -> Load:
    """load(text, env, deployment, *settings): settings are "key=value", set by --set."""

    def load(
        text: str | None,
        env: Mapping[str, str] | None = None,
        deployment: str | None = None,
        *settings: str,
        accelerator: bool = False,
    ) -> Config:
        path = None if text is None else Path("moorage.yaml")
        if text is not None:
            (folder / "moorage.yaml").write_text(text)
        pairs = (setting.partition("=") for setting in settings)
        flags = Flags(None, deployment, tuple((key, value, "--set") for key, _, value in pairs))
        return reading.load(
            path, {"HOME": "/home/someone", **(env or {})}, flags, accelerator=lambda: accelerator
        )

    return load


@pytest.fixture
def refusal(load: Load) -> Refusal:
    """As `load`, for what must be refused: the error."""

    def refusal(*args: object, **kwargs: object) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            load(*args, **kwargs)
        return caught.value

    return refusal
