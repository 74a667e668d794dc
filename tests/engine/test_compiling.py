"""`compile: true`: the same tokens, nothing compiled once it serves, refused where it cannot be."""

import gc
import os
import re
import shutil
import subprocess
import sys
import traceback
import weakref
from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from service.engine.engine import Engine
from service.engine.runner import Runner
from service.engine.slot_cache import SlotStep
from service.errors import LoadFailed
from service.placement import loading
from tests.engine.models import generated
from tests.engine.models import model_of
from tests.engine.models import stay
from tests.engine.models import t5
from tests.engine.scripted import greedy
from tests.engine.scripted import read_all

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # torch calls it itself
]
ROOT = Path(__file__).resolve().parents[2]
START = """
from service.errors import LoadFailed
from service.placement import loading
from tests.engine.models import model_of
from tests.engine.test_compiling import engine_of

engine = engine_of(model_of("llama"))
try:
    engine.start()
except LoadFailed as error:
    print(error.one_line())
finally:
    engine.close()
"""
NEW_TOKENS = 12
# one token, a few, and more than a step
PROMPTS = ((65,), tuple(range(10, 15)), tuple(range(30, 80)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What another run compiled must not be found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def engine_of(model) -> Engine:
    runner = Runner(model, stay, max_context=128, max_sequences=3, step_tokens=16, compiled=True)
    return Engine(runner, max_queue=16)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_compiled_model_says_what_generate_says_and_is_compiled_only_before_it_serves(arch: str):
    model = model_of(arch)
    expected = [generated(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    engine = engine_of(model)
    engine.start()
    try:
        assert engine.describe()["path"] == "ragged"
        assert engine.describe()["compiled"] is True
        before = counters["frames"]["total"]
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            alone = read_all(engine.submit(prompt, greedy(NEW_TOKENS)))
            assert alone[: len(answer)] == answer
        streams = [engine.submit(prompt, greedy(NEW_TOKENS)) for prompt in PROMPTS]
        for stream, answer in zip(streams, expected, strict=True):
            assert read_all(stream)[: len(answer)] == answer
        assert counters["frames"]["total"] == before
        # tensors without values, which tracing left behind, are no memory of a failed load (F21)
        assert loading.allocated_bytes()["cpu"] > 0
    finally:
        engine.close()
    alive = weakref.ref(model)
    del model, engine, streams, stream
    gc.collect()
    assert alive() is None


def test_the_program_is_what_runs(monkeypatch: pytest.MonkeyPatch):
    """Attention is called by what was compiled, not by transformers' code."""
    engine = engine_of(model_of("llama"))
    engine.start()
    callers: list[str] = []
    attend = SlotStep.attend

    def seen(self, *args):
        callers.extend(frame.filename for frame in traceback.extract_stack())
        return attend(self, *args)

    monkeypatch.setattr(SlotStep, "attend", seen)
    try:
        assert len(read_all(engine.submit((5, 6, 7), greedy(4)))) == 4
    finally:
        engine.close()
    assert callers
    assert not [name for name in callers if "modeling_llama" in name]


def test_a_model_of_the_plain_path_is_refused():
    engine = engine_of(t5())
    with pytest.raises(LoadFailed, match="cannot be compiled: it is an encoder-decoder"):
        engine.start()


def test_a_compiler_that_is_not_there_is_told_in_a_line(tmp_path: Path):
    """In a process of its own: what was compiled here before would be found."""
    env = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", START], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    assert re.match(r"the model cannot be compiled: .*[Cc]ompiler.*  fix: set compile: false", line)


def test_a_program_with_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch):
    """What is compiled is proven, not believed."""
    from service.engine import compiling

    call = compiling.Compiled.__call__

    def wrong(self, **inputs):
        found = call(self, **inputs)
        found.logits = found.logits.roll(1, -1)
        return found

    monkeypatch.setattr(compiling.Compiled, "__call__", wrong)
    engine = engine_of(model_of("llama"))
    with pytest.raises(LoadFailed, match="cannot be compiled: its logits on the ragged path are"):
        engine.start()
