"""A deployment becomes ready when its model is proven; it says what it does until its end."""

from pathlib import Path
from typing import Any

import pytest

from service.engine.params import SamplingParams
from service.errors import NotReady
from tests.deployment.conftest import Make
from tests.deployment.conftest import answer
from tests.deployment.strategies import load_then
from tests.deployment.strategies import write
from tests.support.gates import PATIENCE_S
from tests.support.tiny import IM_END


def test_a_proven_model_becomes_ready_and_answers(make: Make, model: Path) -> None:
    watched = make()
    deployment = watched.settle()
    assert (deployment.state, deployment.progress) == ("ready", 1.0)
    assert watched.ready == ["tiny"]
    serving = deployment.serving()
    assert (serving.model_id, serving.max_context) == ("tiny", 64)
    assert IM_END in serving.stop_ids
    assert serving.tokenizer.encode("a") == [97]
    assert len(answer(deployment, [1, 2, 3])) == 4
    assert not watched.failures
    assert watched.deaths == 0


def test_before_the_start_it_is_planned_and_answers_nothing(make: Make) -> None:
    deployment = make().deployment
    document = deployment.document()
    assert (document["state"], document["progress"]) == ("planned", 0.0)
    assert document["certificate"] is None
    assert document["devices"] == []
    assert document["activity"] is None
    assert document["model"]["parameters"] is None
    with pytest.raises(NotReady, match="The model is not ready: planned"):
        deployment.serving()


def test_the_document_of_a_ready_deployment(make: Make) -> None:
    deployment = make().settle()
    document = deployment.document()
    assert document.keys() == {
        "object",
        "schema",
        "state",
        "progress",
        "deployment",
        "model",
        "strategy",
        "origin",
        "kv",
        "activity",
        "engine",
        "devices",
        "certificate",
        "watch",
        "attempts",
        "warnings",
    }
    assert (document["object"], document["schema"], document["state"]) == ("placement", 1, "ready")
    assert document["deployment"] == "test"
    # one token was generated before it was ready
    assert document["activity"].keys() == {
        "running",
        "waiting",
        "prompt_tokens",
        "generated_tokens",
    }
    assert (document["activity"]["running"], document["activity"]["waiting"]) == (0, 0)
    parameters = 2 * 258 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64)
    assert document["model"] == {
        "id": "tiny",
        "parameters": parameters,
        "dtype": "float32",
        "quantize": "none",
        "max_context": 64,
    }
    assert document["strategy"] == {"name": "cpu", "source": "plugins/cpu.py"}
    assert document["origin"] == {"strategy": "moorage.yaml:7", "quantize": "env QUANTIZE"}
    per_token = 2 * 2 * (16 + 16) * 4  # layers, KV heads, key and value, bytes
    assert document["kv"] == {
        "bytes_per_token": per_token,
        "planned_tokens": 128,
        "used_tokens": 0,
    }
    [device] = document["devices"]
    assert device["id"] == "cpu"
    assert device["planned"]["kv"] == 128 * per_token
    assert device["measured"]["allocated"] == device["planned"]["weights"] >= parameters * 4
    assert device["plan_error_bytes"] == 0
    names = [group["name"] for group in device["modules"]]
    assert names[:2] == ["model.embed_tokens", "model.layers.0-1"]
    certificate = document["certificate"]
    assert (certificate["valid"], certificate["revoked"]) == (True, None)
    assert certificate["unchanged_until"] >= certificate["issued_at"]
    assert {check["status"] for check in certificate["checks"]} == {"pass"}
    assert document["attempts"] == []
    assert document["warnings"][0] == "DEVICE_MAP is an old name."


def test_a_plan_that_is_far_off_is_told_in_bytes_and_as_a_warning(
    make: Make, tmp_path: Path
) -> None:
    hooks = load_then('model.register_buffer("more", model.lm_head.weight.detach().clone(), False)')
    write(tmp_path / "strategies", "fat", hooks)
    deployment = make("fat").settle()
    assert deployment.state == "ready", deployment.error
    document = deployment.document()
    [device] = document["devices"]
    more = 258 * 64 * 4
    assert device["plan_error_bytes"] == more
    assert document["certificate"]["plan_error_bytes"] == {"cpu": more}
    planned = device["planned"]["weights"]
    assert document["warnings"][-1] == (
        f"cpu holds {more:,} bytes of weights more than planned ({planned:,})"
    )


def test_json_can_say_the_document(make: Make) -> None:
    import json

    assert json.loads(json.dumps(make().settle().document()))["state"] == "ready"


# --- its end


def test_a_drained_deployment_takes_nothing_new(make: Make) -> None:
    watched = make()
    deployment = watched.settle()
    engine = deployment.serving().engine
    deployment.drain(1.0)
    assert deployment.state == "draining"
    assert deployment.document()["state"] == "draining"
    with pytest.raises(NotReady, match="The model is not ready: draining"):
        deployment.serving()
    assert not engine.alive
    assert watched.deaths == 0


def test_what_runs_is_finished_by_a_drain(make: Make) -> None:
    deployment = make().settle()
    stream = deployment.serving().engine.submit(
        [1, 2, 3], SamplingParams(max_tokens=20, temperature=0.0)
    )
    deployment.drain(PATIENCE_S)
    tokens: list[int] = []
    while more := stream.read(PATIENCE_S):
        tokens += more
    assert len(tokens) == 20
    assert stream.finish_reason == "length"


def test_an_engine_that_dies_is_told_and_no_longer_serves(make: Make) -> None:
    watched = make()
    deployment = watched.settle()
    deployment._died(deployment.status, RuntimeError("out of memory"))
    assert deployment.state == "failed"
    assert watched.deaths == 1
    assert deployment.document()["error"]["message"] == "the engine stopped: RuntimeError"
    with pytest.raises(NotReady):
        deployment.serving()


def test_an_error_nobody_expected_is_seen(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from service.placement import hardware

    def broken(folder: Path) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(hardware, "detect", broken)
    deployment = make().settle()
    assert deployment.error is not None
    assert deployment.error.message == "unexpected MemoryError while loading; see the log"
    assert "unexpected error while the deployment was brought up" in caplog.text
