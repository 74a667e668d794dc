"""A tiny encoder under gunicorn: clients that leave, deadlines, limits of keys, NaN.

Each leaves the server as it was.
"""

import contextlib
import http.client
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file

from tests.server.process import Answer
from tests.server.process import Server
from tests.server.process import wait_for
from tests.server.test_real_app import CONF
from tests.support.encoders import save_encoder

BAD = 7  # its embedding is NaN
SLOW = 9  # a forward with it takes as long as there is a file "hold" beside the strategy
PATH = "/v1/embeddings"
STRATEGY = f'''"""A strategy whose model can be held in a forward."""

import time
from pathlib import Path

from service.placement import checks, planning
from service.placement.hookspecs import hookimpl
from service.placement.inputs import to_input_device

HOLD = Path(__file__).parent / "hold"


def wait(module, args, kwargs):
    while (kwargs["input_ids"] == {SLOW}).any() and HOLD.exists():
        HOLD.with_name("held").touch()
        time.sleep(0.01)


@hookimpl
def plan(config, hardware):
    return planning.on_one_device(config, hardware, "cpu")


@hookimpl
def load(config, placement):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(config.folder, **placement.load_kwargs)
    model.register_forward_pre_hook(wait, with_kwargs=True)
    return model


@hookimpl
def validate(model, placement):
    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    return to_input_device(model, inputs)
'''


class Embedding(Server):
    """A server whose forward can be held."""

    def __init__(self, folder: Path) -> None:
        self.strategies = folder / "strategies"
        self.strategies.mkdir()
        (self.strategies / "holding.py").write_text(STRATEGY)
        model = save_encoder(folder / "tiny")
        tensors = load_file(model / "model.safetensors")
        tensors["embeddings.word_embeddings.weight"][BAD] = torch.nan
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        document = {
            "version": 1,
            "server": {
                "bind": "127.0.0.1:0",
                "threads": 16,
                "grace_s": 5,
                "log_format": "json",
                "key_limits": {"batch": {"tokens_per_minute": 20}},
            },
            "deployments": {
                "here": {
                    "model": str(model),
                    "strategy": "holding",
                    "strategy_dirs": ["./strategies"],
                    "max_sequences": 4,
                }
            },
        }
        (folder / "moorage.yaml").write_text(json.dumps(document))
        keys = "free: a-free-key-of-tests, batch: a-batch-key-of-tests"
        super().__init__(
            folder / "log", conf=CONF, cwd=folder, OMP_NUM_THREADS="1", MOORAGE_API_KEYS=keys
        )

    def begin(
        self, *texts: list[int], key: str = "free", **headers: str
    ) -> http.client.HTTPConnection:
        """Ask, and do not wait for the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer a-{key}-key-of-tests",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        body = json.dumps({"model": "tiny", "input": texts})
        connection.request("POST", PATH, body, given)
        return connection

    def ask(self, *texts: list[int], **more: str) -> Answer:
        with contextlib.closing(self.begin(*texts, **more)) as connection:
            return Answer(connection.getresponse())

    @contextlib.contextmanager
    def held(self) -> Iterator[http.client.HTTPConnection]:
        """A request that is computed for as long as the block takes; its connection."""
        hold, held = self.strategies / "hold", self.strategies / "held"
        held.unlink(missing_ok=True)
        hold.touch()
        try:
            with contextlib.closing(self.begin([SLOW, 20], X_Request_Id="held")) as connection:
                wait_for("the forward", held.exists)
                yield connection
        finally:
            hold.unlink(missing_ok=True)

    def counts(self) -> tuple[int, int]:
        """Texts that run and that wait."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(
                "GET", "/metrics", headers={"Authorization": "Bearer a-free-key-of-tests"}
            )
            text = connection.getresponse().read().decode()
        names = ("num_requests_running", "num_requests_waiting")
        found = [re.search(rf"^moorage:{name}(?:{{.*}})? (\S+)$", text, re.M) for name in names]
        running, waiting = (int(float(one[1])) for one in found if one is not None)
        return running, waiting

    def line_of(self, request_id: str) -> dict[str, Any]:
        """The log line of that request."""

        def probe() -> dict[str, Any] | None:
            lines = [json.loads(line) for line in self.log().splitlines() if line[:1] == "{"]
            return next((one for one in lines if one.get("request_id") == request_id), None)

        return wait_for(f"the line of {request_id}", probe)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedding]:
    with Embedding(tmp_path_factory.mktemp("embedding")) as server:
        wait_for("readiness", lambda: server.port and server.try_get("/health") == 200)
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture
def server(shared: Embedding) -> Iterator[Embedding]:
    """The shared server; afterwards nothing is in use, and it answers as before."""
    before = row(shared.ask([20, 21, 22]))
    yield shared
    wait_for("idle", lambda: shared.counts() == (0, 0))
    assert row(shared.ask([20, 21, 22])) == before
    assert shared.get("/health").status == 200


def row(answer: Answer, index: int = 0) -> list[float]:
    assert answer.status == 200, answer.body
    found: list[float] = answer.json["data"][index]["embedding"]
    return found


def test_a_client_that_leaves_while_its_text_is_computed_is_let_go(server: Embedding) -> None:
    with server.held() as connection:
        assert server.counts() == (1, 0)
        connection.close()
        # while the forward still runs: nobody waits for what cannot be stopped
        assert server.line_of("held")["error"] == "client_closed_request"


def test_a_client_that_leaves_while_its_texts_wait_is_let_go_and_harms_no_other(
    server: Embedding,
) -> None:
    with server.held() as connection:
        waiting = server.begin([20], [21, 22], X_Request_Id="left-waiting")
        wait_for("the queue", lambda: server.counts() == (1, 2))
        waiting.close()
        assert server.line_of("left-waiting")["error"] == "client_closed_request"
        (server.strategies / "hold").unlink()
        assert len(row(Answer(connection.getresponse()))) == 64


@pytest.mark.parametrize("phase", ["computing", "waiting"])
def test_a_deadline_is_kept_while_a_text_waits_or_is_computed(
    server: Embedding, phase: str
) -> None:
    with server.held():
        text = [SLOW] if phase == "computing" else [20]
        late = server.ask(text, X_Request_Timeout_S="0.2")
        assert late.status == 504, late.body
        assert late.json["error"]["code"] == "deadline_exceeded"


def test_a_keys_tokens_are_those_of_all_its_texts(server: Embedding) -> None:
    answer = server.ask([20] * 25, [21] * 100, key="batch")
    assert answer.json["usage"]["total_tokens"] == 125
    refused = server.ask([20], key="batch")  # for a hundred seconds and more
    assert refused.status == 429
    assert refused.json["error"]["code"] == "rate_limit_exceeded", refused.body
    assert int(refused.headers["Retry-After"]) > 0
    assert len(row(server.ask([20]))) == 64


def test_what_is_not_a_number_fails_its_request_and_no_other(server: Embedding) -> None:
    """All three are computed in one forward: they wait for the one before."""
    alone = [row(server.ask([20, 21])), row(server.ask([22]))]
    with ThreadPoolExecutor(3) as pool:
        with server.held():
            asked = [pool.submit(server.ask, texts) for texts in ([20, 21], [20, BAD], [22])]
            wait_for("the queue", lambda: server.counts() == (1, 3))
        first, bad, last = (future.result(60) for future in asked)
    assert bad.status == 500, bad.body
    assert bad.json["error"]["code"] == "non_finite_logits"
    for answer, expected in zip((first, last), alone, strict=True):
        assert all(
            math.isclose(a, b, abs_tol=1e-5) for a, b in zip(row(answer), expected, strict=True)
        )
