"""A deployment with nothing behind it: what the web room is given, in any state a test wants."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from pydantic import SecretStr

from service.config.api_key import ApiKey
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.deployment.serving import Embeddings
from service.deployment.uses import Uses
from service.errors import NotReady
from service.errors import PlacementDrifted
from tests.support.fake_engine import FakeEngine
from tests.support.tiny import IM_END
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_tokenizer

MODEL_ID = "tiny/chat"


def fake_config(*, api_keys: Sequence[str] = (), max_sequences: int = 8, **server: Any) -> Config:
    """A configuration as `reading` would make it. server: keys of the server block."""
    return Config(
        path=None,
        name="test",
        server=ServerConfig(**server),
        deployment=DeploymentConfig(max_sequences=max_sequences),
        origins={},
        api_keys=api_keys_of(api_keys),
    )


def api_keys_of(written: Sequence[str]) -> tuple[ApiKey, ...]:
    """Keys as "KEY" or "NAME: KEY", also such as the configuration would refuse."""
    found = [text.rpartition(": ") for text in written]
    return tuple(ApiKey(n or f"key-{i}", SecretStr(k)) for i, (n, _, k) in enumerate(found, 1))


@dataclass(frozen=True)
class FakeServing:
    engine: Any = field(default_factory=FakeEngine)
    tokenizer: Any = field(default_factory=tiny_tokenizer)
    model_id: str = MODEL_ID
    created: int = 1_700_000_000
    stop_ids: frozenset[int] = frozenset({IM_END})
    max_context: int = 200
    defaults: dict[str, float] = field(default_factory=dict)
    vocabulary: int = VOCAB
    uses: Uses = field(default_factory=Uses)
    embeddings: Embeddings | None = None


@dataclass
class FakeDeployment:
    """Ready unless `state` says otherwise."""

    config: Config = field(default_factory=fake_config)
    state: str = "ready"
    progress: float = 1.0
    model: FakeServing = field(default_factory=FakeServing)
    drift: PlacementDrifted | None = None

    def document(self) -> dict[str, Any]:
        return {"object": "placement", "schema": 1, "state": self.state, "progress": self.progress}

    def serving(self) -> FakeServing:
        if self.drift is not None:
            raise self.drift
        if self.state != "ready":
            raise NotReady(f"{self.state} {self.progress:.0%}, try again", retry_after_s=7)
        return self.model

    def use(self, deadline: float | None = None) -> FakeServing:
        serving = self.serving()
        serving.uses.enter()
        return serving

    def probed(self) -> FakeServing:
        return self.serving()

    def start(self) -> None:
        self.state = "ready"

    def drain(self, seconds: float) -> None:
        self.state = "draining"
