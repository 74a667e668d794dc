"""A deployment becomes ready when its model is proven; otherwise it fails and says why, by name."""

import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest

from service import deployment as deployment_module
from service.config.origin import Origin
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.deployment import Deployment
from service.engine.sequence import SamplingParams
from service.errors import NotReady
from service.errors import PlacementDrifted
from service.errors import ServiceError
from service.placement import guard
from tests.support.gates import PATIENCE_S
from tests.support.gates import Gate
from tests.support.gates import new_gate
from tests.support.tiny import IM_END
from tests.support.tiny import save_tiny

# each hook as in a strategy that works; a fault replaces some of them
HOOKS = {
    "plan": """
@hookimpl
def plan(config, hardware):
    return planning.on_one_device(config, hardware, "cpu")
""",
    "load": """
@hookimpl
def load(config, placement):
    return loaded(config, placement)
""",
    "validate": """
@hookimpl
def validate(model, placement):
    checks.placed_as_planned(model, placement)
""",
    "place_inputs": """
@hookimpl
def place_inputs(model, inputs):
    return to_input_device(model, inputs)
""",
}
HEAD = '''"""A strategy of a test."""

from service.placement import checks, planning
from service.placement.hookspecs import hookimpl
from service.placement.inputs import to_input_device


def loaded(config, placement):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)

'''


def load_then(line: str) -> dict[str, str]:
    """The hook `load` that loads, does one more thing and returns the model."""
    return {
        "load": f"""
@hookimpl
def load(config, placement):
    model = loaded(config, placement)
    {line}
    return model
"""
    }


@dataclass(frozen=True)
class Fault:
    """What is wrong with a strategy, and what the error must say of it."""

    hooks: dict[str, str]
    says: tuple[str, ...]
    code: str
    failure_class: str | None = None
    tensors: tuple[str, ...] = field(default=())


FAULTS = {
    "head-on-meta": Fault(
        load_then('model.lm_head.to("meta")'),
        ("lm_head.weight was left on meta (F1)", "Strategy head-on-meta"),
        "placement_mismatch",
        "F1",
        ("lm_head.weight",),
    ),
    "buffer-on-meta": Fault(
        load_then("model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to('meta')"),
        ("model.rotary_emb.inv_freq was left on meta (F2)", "Strategy buffer-on-meta"),
        "placement_mismatch",
        "F2",
        ("model.rotary_emb.inv_freq",),
    ),
    "load-raises": Fault(
        load_then("raise RuntimeError('the cable is out')"),
        ("strategy load-raises: load raised RuntimeError: the cable is out", "load_raises.py:"),
        "load_failed",
    ),
    "returns-none": Fault(
        {"load": "\n@hookimpl\ndef load(config, placement):\n    pass\n"},
        ("strategy returns-none: load returned None; it must return the model",),
        "plugin_error",
    ),
    "plan-raises": Fault(
        {"plan": "\n@hookimpl\ndef plan(config, hardware):\n    return 1 / 0\n"},
        ("strategy plan-raises: plan raised ZeroDivisionError", "plan_raises.py:"),
        "plugin_error",
    ),
    "plan-returns-a-map": Fault(
        {"plan": "\n@hookimpl\ndef plan(config, hardware):\n    return {'': 'cpu'}\n"},
        ("strategy plan-returns-a-map: plan returned {'': 'cpu'}; it must return a Placement",),
        "plugin_error",
    ),
    "validate-raises": Fault(
        {"validate": "\n@hookimpl\ndef validate(model, placement):\n    raise KeyError('lm')\n"},
        ("strategy validate-raises: validate raised KeyError: 'lm'", "validate_raises.py:"),
        "plugin_error",
    ),
    "places-nothing": Fault(
        {"place_inputs": "\n@hookimpl\ndef place_inputs(model, inputs):\n    return None\n"},
        ("strategy places-nothing: place_inputs returned NoneType",),
        "plugin_error",
    ),
    "places-on-meta": Fault(
        {
            "place_inputs": """
@hookimpl
def place_inputs(model, inputs):
    return {name: tensor.to("meta") for name, tensor in inputs.items()}
"""
        },
        ("strategy places-on-meta: place_inputs put input_ids on meta", "(F7)"),
        "placement_mismatch",
        "F7",
    ),
    "places-other-ids": Fault(
        {
            "place_inputs": """
@hookimpl
def place_inputs(model, inputs):
    return {name: tensor + 1 for name, tensor in inputs.items()}
"""
        },
        ("strategy places-other-ids: place_inputs changed the values of input_ids",),
        "placement_mismatch",
    ),
    "places-raises": Fault(
        {"place_inputs": "\n@hookimpl\ndef place_inputs(model, inputs):\n    raise OSError(5)\n"},
        ("strategy places-raises: place_inputs raised OSError: 5",),
        "plugin_error",
    ),
    "leaves-a-global": Fault(
        load_then("import torch; torch.set_default_dtype(torch.float64)"),
        ("3 loads in a row were overlapped", "torch default dtype is torch.float64", "(F4)"),
        "load_failed",
        "F4",
    ),
    "breaks-in-the-forward": Fault(
        load_then("model.model.layers[1].mlp.down_proj.weight.data = model.lm_head.weight.data"),
        ("model.layers.1.mlp.down_proj cannot run: RuntimeError",),
        "placement_mismatch",
        tensors=("model.layers.1.mlp.down_proj",),
    ),
}


def write(folder: Path, name: str, hooks: dict[str, str]) -> None:
    """A strategy file; `name` has dashes."""
    folder.mkdir(exist_ok=True)
    text = HEAD + "\n".join({**HOOKS, **hooks}.values())
    (folder / f"{name.replace('-', '_')}.py").write_text(text)


class Watched:
    """A deployment whose callbacks are recorded."""

    def __init__(self, config: Config) -> None:
        self.deployment = Deployment(config)
        self.ready: list[str] = []
        self.failures: list[ServiceError] = []
        self.deaths = 0
        self._settled = threading.Event()
        self.deployment.on_ready = self._on_ready
        self.deployment.on_failure = self._on_failure
        self.deployment.on_death = self._on_death

    def _on_ready(self, model_id: str) -> None:
        self.ready.append(model_id)
        self._settled.set()

    def _on_failure(self, error: ServiceError) -> None:
        self.failures.append(error)
        self._settled.set()

    def _on_death(self) -> None:
        self.deaths += 1

    def settle(self) -> Deployment:
        """Start, and wait until it is ready or has failed."""
        self.deployment.start()
        return self.wait()

    def wait(self) -> Deployment:
        assert self._settled.wait(PATIENCE_S), f"still {self.deployment.state}"
        return self.deployment


Make = Callable[..., Watched]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama", tie=False)


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Iterator[Make]:
    """make(strategy, **keys): a deployment of the tiny model; keys are the deployment's."""
    made: list[Watched] = []

    def make(strategy: str = "cpu", **keys: Any) -> Watched:
        settings = {"model": str(model), "max_context": 64, "max_sequences": 2, **keys}
        strategies = tmp_path / "strategies"
        if strategies.exists():
            settings["strategy_dirs"] = (strategies,)
        config = Config(
            path=None,
            name="test",
            server=ServerConfig(),
            deployment=DeploymentConfig(strategy=strategy, **settings),
            origins={
                "strategy": Origin("file", "moorage.yaml", 7),
                "quantize": Origin("env", "QUANTIZE"),
                "max_context": Origin("built-in"),
            },
            notices=("DEVICE_MAP is an old name.",),
            cache=tmp_path / "cache",
        )
        made.append(Watched(config))
        return made[-1]

    yield make
    for watched in made:
        watched.deployment.drain(0.0)
    guard.heal()


def answer(deployment: Deployment, prompt: list[int]) -> list[int]:
    stream = deployment.serving().engine.submit(
        prompt, SamplingParams(max_tokens=4, temperature=0.0)
    )
    tokens: list[int] = []
    while more := stream.read(PATIENCE_S):
        tokens += more
    return tokens


# --- it works


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
        "devices",
        "certificate",
        "watch",
        "attempts",
        "warnings",
    }
    assert (document["object"], document["schema"], document["state"]) == ("placement", 1, "ready")
    assert document["deployment"] == "test"
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
    assert certificate["valid"] is True
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


# --- faults, one by one


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_strategy_never_becomes_ready_and_is_named(
    make: Make, tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    write(tmp_path / "strategies", name, fault.hooks)
    watched = make(name)
    deployment = watched.settle()
    assert deployment.state == "failed"
    assert not watched.ready
    [error] = watched.failures
    assert error is deployment.error
    for words in fault.says:
        assert words in error.message
    assert error.code == fault.code
    assert error.failure_class == fault.failure_class
    assert error.tensors == fault.tensors
    assert "\n" not in error.one_line()
    with pytest.raises(NotReady, match="The model is not ready: failed"):
        deployment.serving()
    document = deployment.document()
    assert document["state"] == "failed"
    assert document["error"] == error.as_dict()
    assert document["strategy"]["name"] == name
    assert document["strategy"]["source"].endswith(".py")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fallback_serves_after_a_fault_and_says_why(
    make: Make, tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    write(tmp_path / "strategies", name, fault.hooks)
    deployment = make(name, fallback=("cpu",)).settle()
    assert deployment.state == "ready", deployment.error
    assert len(answer(deployment, [1, 2, 3])) == 4
    document = deployment.document()
    assert document["strategy"]["name"] == "cpu"
    assert document["certificate"]["valid"] is True
    [attempt] = document["attempts"]
    assert attempt["strategy"] == name
    assert attempt["seconds"] >= 0
    assert attempt["error"]["code"] == fault.code
    assert fault.says[0] in attempt["error"]["message"]
    assert "error" not in document


def test_when_every_strategy_fails_each_attempt_is_told_and_the_last_is_the_error(
    make: Make, tmp_path: Path
) -> None:
    for name in ("load-raises", "head-on-meta"):
        write(tmp_path / "strategies", name, FAULTS[name].hooks)
    deployment = make("load-raises", fallback=("head-on-meta",)).settle()
    attempts = deployment.document()["attempts"]
    assert [attempt["strategy"] for attempt in attempts] == ["load-raises", "head-on-meta"]
    assert deployment.error is not None
    assert deployment.error.failure_class == "F1"


def test_an_unknown_fallback_is_refused_before_anything_is_loaded(make: Make) -> None:
    deployment = make(fallback=("cppu",)).settle()
    assert deployment.state == "failed"
    assert deployment.error is not None
    assert "unknown strategy 'cppu'; did you mean 'cpu'?" in deployment.error.message
    assert deployment.document()["devices"] == []


def test_a_model_that_is_not_there_fails(make: Make, tmp_path: Path) -> None:
    deployment = make(model=str(tmp_path / "nowhere")).settle()
    assert deployment.error is not None
    assert deployment.error.code == "model_unavailable"
    assert "nowhere" in deployment.error.message


def test_an_accelerator_that_is_not_there_falls_back_to_what_is(make: Make) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    deployment = make("single-gpu", fallback=("auto-shard",)).settle()
    document = deployment.document()
    assert document["strategy"]["name"] == "auto-shard"
    assert document["attempts"][0]["error"]["failure_class"] == "F19"


# --- each attempt begins clean (F21)

KEEPING = """
kept = []


@hookimpl
def load(config, placement):
    model = loaded(config, placement)
    model.lm_head.to("meta")
    kept.append(model)
    return model
"""
RELEASING = """

@hookimpl
def release(model):
    kept.remove(model)
"""


def test_a_strategy_that_keeps_its_model_lets_no_other_begin(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "keeping", {"load": KEEPING})
    deployment = make("keeping", fallback=("cpu",)).settle()
    assert deployment.error is not None
    assert deployment.error.failure_class == "F21"
    [attempt] = deployment.document()["attempts"]
    assert attempt["error"]["failure_class"] == "F1"


def test_alone_it_is_told_of_its_own_fault(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "keeping", {"load": KEEPING})
    deployment = make("keeping").settle()
    assert deployment.error is not None
    assert deployment.error.failure_class == "F1"


def test_release_is_called_after_a_refused_certificate(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "releasing", {"load": KEEPING + RELEASING})
    deployment = make("releasing", fallback=("cpu",)).settle()
    assert deployment.state == "ready", deployment.error


def test_a_release_that_raises_does_not_hide_the_fault(make: Make, tmp_path: Path) -> None:
    broken = RELEASING.replace("kept.remove(model)", "raise OSError('stuck')")
    hooks = {"load": KEEPING.replace("    kept.append(model)\n", "") + broken}
    write(tmp_path / "strategies", "stuck", hooks)
    deployment = make("stuck", fallback=("cpu",)).settle()
    assert deployment.state == "ready", deployment.error
    assert deployment.document()["attempts"][0]["error"]["failure_class"] == "F1"


# --- what hangs

HANGING = """
from tests.support.gates import gate


@hookimpl
def {hook}({arguments}):
    gate("{name}").pass_through()
    return {result}
"""
HANGS = {
    "plan": ("config, hardware", 'planning.on_one_device(config, hardware, "cpu")'),
    "load": ("config, placement", "loaded(config, placement)"),
    "validate": ("model, placement", "None"),
    "place_inputs": ("model, inputs", "to_input_device(model, inputs)"),
}


def end_of_loading() -> None:
    for thread in threading.enumerate():
        if thread.name == "load":
            thread.join(PATIENCE_S)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Callable[[str], tuple[str, Gate]]]:
    """Write a strategy that hangs in a hook until the test, or its end, opens the gate. Returns
    its name and the gate.
    """
    gates: list[Gate] = []

    def write_one(hook: str) -> tuple[str, Gate]:
        arguments, result = HANGS[hook]
        name = f"hangs-in-{hook.replace('_', '-')}"
        gates.append(new_gate(name))
        text = HANGING.format(hook=hook, arguments=arguments, result=result, name=name)
        write(tmp_path / "strategies", name, {hook: text})
        return name, gates[-1]

    yield write_one
    for one in gates:
        one.open()
    end_of_loading()


Hanging = Callable[[str], tuple[str, Gate]]


@pytest.mark.parametrize("hook", HANGS)
def test_a_hook_that_hangs_is_named_after_the_load_timeout(
    make: Make, hanging: Hanging, hook: str
) -> None:
    name, _ = hanging(hook)
    watched = make(name, load_timeout_s=0.05, fallback=("cpu",))
    deployment = watched.settle()
    assert deployment.state == "failed"
    [error] = watched.failures
    assert f"strategy {name} was not done within load_timeout_s: 0.05 s" in error.message
    assert error.hint is not None
    assert "load_timeout_s" in error.hint


@pytest.mark.parametrize("hook", HANGS)
def test_a_hook_that_comes_back_too_late_changes_nothing(
    make: Make, hanging: Hanging, hook: str
) -> None:
    name, gate = hanging(hook)
    watched = make(name, load_timeout_s=0.05, fallback=("cpu",))
    deployment = watched.settle()
    gate.open()
    end_of_loading()
    assert deployment.state == "failed"
    assert deployment.document()["attempts"] == []
    assert not watched.ready
    assert len(watched.failures) == 1
    with pytest.raises(NotReady):
        deployment.serving()


def test_while_it_loads_it_says_so_and_how_far(make: Make, hanging: Hanging) -> None:
    name, gate = hanging("load")
    watched = make(name)
    deployment = watched.deployment
    deployment.start()
    gate.wait_until_reached()
    document = deployment.document()
    assert document["state"] == "loading"
    assert 0 <= document["progress"] < 0.9
    assert document["devices"][0]["measured"] is None
    assert document["certificate"] is None
    with pytest.raises(NotReady, match=r"The model is not ready: loading \d+%") as caught:
        deployment.serving()
    assert caught.value.retry_after_s
    gate.open()
    assert watched.wait().state == "ready"


def test_while_it_is_proven_it_does_not_answer(make: Make, hanging: Hanging) -> None:
    name, gate = hanging("validate")
    watched = make(name)
    deployment = watched.deployment
    deployment.start()
    gate.wait_until_reached()
    document = deployment.document()
    assert (document["state"], document["progress"]) == ("validating", 0.9)
    with pytest.raises(NotReady, match="The model is not ready: validating"):
        deployment.serving()
    gate.open()
    assert watched.wait().state == "ready"


def test_a_drain_while_it_loads_is_not_undone_by_the_end_of_the_load(
    make: Make, hanging: Hanging
) -> None:
    name, gate = hanging("load")
    watched = make(name)
    deployment = watched.deployment
    deployment.start()
    gate.wait_until_reached()
    deployment.drain(0.0)
    gate.open()
    end_of_loading()
    assert deployment.state == "draining"
    assert not watched.ready
    assert not watched.failures


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
    deployment._died(RuntimeError("out of memory"))
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


# --- its model changes while it serves


def model_of(deployment: Deployment) -> Any:
    return deployment.serving().engine._runner._model


def signalled(watched: Watched, callback: str) -> threading.Event:
    """Set when the callback is called from now on; it is recorded as before."""
    called = threading.Event()
    record = getattr(watched.deployment, callback)

    def call(*args: Any) -> None:
        record(*args)
        called.set()

    setattr(watched.deployment, callback, call)
    return called


def find(deployment: Deployment) -> None:
    """Have the engine look, as the timer does, whenever the last probe was."""
    assert deployment.serving().engine.inspect(PATIENCE_S)


def test_a_ready_deployment_says_that_it_is_watched(make: Make) -> None:
    deployment = make().settle()
    assert deployment.document()["watch"]["enabled"] is True
    deployment.probed()
    told = deployment.document()["watch"]
    assert (told["checks"], told["findings"]) == (1, [])
    assert told["checked_at"]


def test_a_probe_sees_the_change_and_the_process_is_to_end(make: Make) -> None:
    watched = make()
    deployment = watched.settle()
    dead = signalled(watched, "on_death")
    model_of(deployment).half()
    with pytest.raises(PlacementDrifted, match=r"\(F18\): .* was float32, is float16"):
        deployment.probed()
    assert dead.wait(PATIENCE_S)
    assert (watched.deaths, watched.failures) == (1, [])
    assert deployment.state == "degraded"
    with pytest.raises(PlacementDrifted, match="as it should be at"):
        deployment.serving()
    document = deployment.document()
    assert document["state"] == "degraded"
    assert document["error"]["code"] == "placement_drifted"
    assert document["error"]["failure_class"] == "F18"
    finding = document["watch"]["findings"][0]
    assert (finding["class"], finding["was"], finding["now"]) == ("F18", "float32", "float16")
    deployment.drain(0.0)
    with pytest.raises(NotReady, match="draining"):
        deployment.serving()


def test_the_timer_sees_the_change_when_nobody_asks(make: Make) -> None:
    watched = make(watch_interval_s=0.01)
    deployment = watched.settle()
    dead = signalled(watched, "on_death")
    model_of(deployment).lm_head.half()
    assert dead.wait(PATIENCE_S)
    assert deployment.state == "degraded"


def test_without_a_watch_nobody_looks(make: Make) -> None:
    deployment = make(watch_interval_s=0).settle()
    assert deployment.document()["watch"] == {
        "enabled": False,
        "checked_at": None,
        "checks": 0,
        "findings": [],
    }
    model_of(deployment).lm_head.half()
    find(deployment)
    assert deployment.probed() is deployment.serving()


def test_open_streams_end_with_what_changed(make: Make) -> None:
    deployment = make().settle()
    model = model_of(deployment)

    def cast(module: Any, args: Any, output: Any) -> None:
        """After a whole step, on the thread of the engine."""
        handle.remove()
        module.half()
        deployment.serving().engine.inspect(0.0)

    handle = model.register_forward_hook(cast)
    with pytest.raises(PlacementDrifted, match="was float32, is float16"):
        answer(deployment, [1, 2, 3])


def test_a_step_that_fails_because_of_the_change_says_so(make: Make) -> None:
    """Half of a product in another number format: torch raises."""
    deployment = make().settle()
    model_of(deployment).model.layers[1].mlp.down_proj.half()
    with pytest.raises(PlacementDrifted, match=r"down_proj.weight was float32, is float16"):
        answer(deployment, [1, 2, 3])


def test_a_nan_in_a_weight_ends_what_would_answer_with_it(make: Make) -> None:
    deployment = make().settle()
    model_of(deployment).model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(PlacementDrifted, match=r"\(F16\): model.norm.weight was finite numbers"):
        answer(deployment, [1, 2, 3])


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_deployment_raises_no_alarm(make: Make, quantize: str) -> None:
    watched = make("four-bit" if quantize == "nf4" else "cpu", quantize=quantize)
    deployment = watched.settle()
    assert deployment.state == "ready", deployment.error
    for prompt in ([1, 2, 3], [4], list(range(20))):
        find(deployment)
        assert len(answer(deployment, prompt)) == 4
    assert deployment.document()["watch"]["checks"] == 3
    assert deployment.state == "ready"


def test_a_reload_brings_the_same_deployment_up_again_in_this_process(make: Make) -> None:
    watched = make(on_drift="reload")
    deployment = watched.settle()
    before = answer(deployment, [1, 2, 3])
    old = weakref.ref(model_of(deployment))
    ready = signalled(watched, "on_ready")
    old().half()  # type: ignore[union-attr]
    find(deployment)
    assert ready.wait(PATIENCE_S)
    assert (watched.ready, watched.deaths, watched.failures) == (["tiny", "tiny"], 0, [])
    assert old() is None
    document = deployment.document()
    assert (document["state"], document["progress"]) == ("ready", 1.0)
    assert document["certificate"]["valid"] is True
    assert document["watch"]["findings"] == []
    assert document["attempts"] == []
    assert "loaded again: the model changed while serving (F18)" in document["warnings"][-1]
    assert "error" not in document
    assert answer(deployment, [1, 2, 3]) == before
    find(deployment)
    assert deployment.state == "ready"


def test_a_reload_calls_the_release_of_the_strategy(make: Make, tmp_path: Path) -> None:
    keeping = KEEPING.replace('    model.lm_head.to("meta")\n', "")
    write(tmp_path / "strategies", "releasing", {"load": keeping + RELEASING})
    watched = make("releasing", on_drift="reload")
    deployment = watched.settle()
    ready = signalled(watched, "on_ready")
    model_of(deployment).half()
    find(deployment)
    assert ready.wait(PATIENCE_S), deployment.error
    assert deployment.state == "ready"


def test_a_model_that_somebody_keeps_is_not_loaded_a_second_time(make: Make) -> None:
    watched = make(on_drift="reload")
    deployment = watched.settle()
    dead = signalled(watched, "on_death")
    kept = model_of(deployment).half()
    find(deployment)
    assert dead.wait(PATIENCE_S)
    assert kept is not None
    assert deployment.state == "failed"
    assert deployment.error is not None
    assert deployment.error.failure_class == "F21"
    assert not watched.failures


FAILING_LATER = """
times = []


@hookimpl
def load(config, placement):
    times.append(1)
    if len(times) > 1:
        raise OSError("the disk is gone")
    return loaded(config, placement)
"""


def test_a_reload_that_fails_leaves_it_to_a_fresh_process(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "strategies", "failing-later", {"load": FAILING_LATER})
    watched = make("failing-later", on_drift="reload")
    deployment = watched.settle()
    dead = signalled(watched, "on_death")
    model_of(deployment).half()
    find(deployment)
    assert dead.wait(PATIENCE_S)
    assert deployment.error is not None
    assert "load raised OSError: the disk is gone" in deployment.error.message
    assert (deployment.state, watched.failures) == ("failed", [])


def test_a_model_that_changes_again_and_again_is_not_reloaded_for_ever(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_module, "MOST_RELOADS", 1)
    watched = make(on_drift="reload")
    deployment = watched.settle()
    ready, dead = signalled(watched, "on_ready"), signalled(watched, "on_death")
    model_of(deployment).half()
    find(deployment)
    assert ready.wait(PATIENCE_S)
    model_of(deployment).half()
    find(deployment)
    assert dead.wait(PATIENCE_S)
    assert deployment.state == "degraded"


def test_a_drain_while_it_reloads_is_not_undone(
    make: Make, tmp_path: Path, hanging: Hanging
) -> None:
    name, gate = hanging("load")
    gate.open()
    watched = make(name, on_drift="reload")
    deployment = watched.settle()
    second = new_gate(name)
    model_of(deployment).half()
    find(deployment)
    second.wait_until_reached()
    assert deployment.state == "loading"
    with pytest.raises(NotReady, match="loading"):
        deployment.probed()
    deployment.drain(0.0)
    second.open()
    end_of_loading()
    assert deployment.state == "draining"
    assert watched.ready == ["tiny"]
