"""The same tokens on an NVIDIA GPU as on the CPU, and what choosing them costs there."""

import time
from typing import Any

import pytest
import torch

from service.engine.choosing import Chosen
from service.engine.choosing import choose
from service.engine.choosing import greedy
from service.engine.choosing import launch
from service.engine.params import SamplingParams
from service.engine.state import State
from service.errors import NonFiniteLogits

pytestmark = pytest.mark.gpu
VOCABULARY = 128_256


class EveryThird:
    """A constraint: multiples of three."""

    def __init__(self, vocabulary: int) -> None:
        self.mask = torch.arange(vocabulary) % 3 == 0

    def allowed(self) -> torch.Tensor:
        return self.mask

    def accept(self, token: int) -> None:
        if token % 3:
            raise AssertionError(f"{token} is not allowed")


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "all tokens": {},
    "min-p": {"min_p": 0.05},
    "top-k 20, top-p 0.95": {"top_k": 20, "top_p": 0.95},
    "top-p 0.9 of 100s": {"temperature": 0.5, "top_p": 0.9},
    "top-p 0.9 of 10,000s": {"temperature": 1.5, "top_p": 0.9},
    "top 20 logprobs, greedy": {"temperature": 0.0, "logprobs": 20},
    "penalties, 1,000 tokens": {
        "temperature": 0.7,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
    },
    "constraint": {"temperature": 0.7, "constraint": True},
    "everything": {
        "temperature": 0.7,
        "top_k": 200,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "logit_bias": ((3, 2.0), (6, -100.0)),
        "min_tokens": 9,
        "stop_ids": frozenset({0, 9}),
        "logprobs": 5,
        "constraint": True,
    },
}


def states(count: int, way: dict[str, Any], vocabulary: int = VOCABULARY) -> list[State]:
    asked = {"temperature": 1.0, **way}
    if asked.pop("constraint", False):
        asked["constraint"] = EveryThird(vocabulary)  # holds no state, so it can be shared
    return [
        State(SamplingParams(max_tokens=100, seed=seed, **asked), range(seed, seed + 1000))
        for seed in range(count)
    ]


def gaussian(rows: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(5)
    made = torch.randn(rows, VOCABULARY, generator=generator, device="cuda") * 3
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_the_gpu_chooses_what_the_cpu_chooses(way: str, dtype: torch.dtype):
    logits = gaussian(48, dtype)
    there, here = states(48, WAYS[way]), states(48, WAYS[way])
    different = 0
    for _ in range(3):
        found, expected = choose(logits, there), choose(logits.cpu(), here)
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, Chosen)
            assert isinstance(other, Chosen)
            different += one.token != other.token
            if one.token == other.token and other.logprob is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [v for _, v in one.top] == pytest.approx([v for _, v in other.top], abs=1e-4)
    # Exponentials differ in their last bit; a random number may fall between the two.
    assert different <= 1


def test_rows_of_every_kind_go_together_and_garbage_fails_its_own():
    logits = gaussian(2 * len(WAYS))
    mixed = [states(1, way)[0] for way in WAYS.values() for _ in range(2)]
    expected = choose(logits.cpu(), [states(1, way)[0] for way in WAYS.values() for _ in range(2)])
    logits[1::2, 77] = torch.nan
    for row, found in enumerate(choose(logits, mixed)):
        if row % 2:
            assert isinstance(found, NonFiniteLogits)
        else:
            assert isinstance(found, Chosen)
            assert found.token == expected[row].token


@pytest.mark.parametrize("way", WAYS)
def test_launching_does_not_wait_for_the_device(way: str):
    logits = gaussian(8)
    asked = states(8, WAYS[way])
    choose(logits, states(8, WAYS[way]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = launch(logits, asked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(isinstance(found, Chosen) for found in pending.collect())


def test_greedy_runs_in_a_cuda_graph():
    logits = gaussian(16)
    greedy(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ready = greedy(logits)
    logits.copy_(gaussian(16).roll(1, 0))
    logits[3, 5] = torch.inf
    graph.replay()
    found = launch(logits, states(16, WAYS["greedy"]), ready).collect()
    assert isinstance(found.pop(3), NonFiniteLogits)
    right = logits.argmax(-1).tolist()
    del right[3]
    assert [each.token for each in found if isinstance(each, Chosen)] == right


def test_what_choosing_costs():
    """A table, no limit: machines differ. Print it with `-s`."""
    logits = gaussian(256)
    print(f"\nchoosing 256 x {VOCABULARY} from bf16 on {torch.cuda.get_device_name()}")
    print(f"{'':26}{'whole':>9}{'launch':>9}{'memory':>10}")
    for name, way in WAYS.items():
        asked = states(256, way)
        whole, host = [], []
        for _ in range(8):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            begun = time.perf_counter()
            pending = launch(logits, asked)
            host.append(time.perf_counter() - begun)
            found = pending.collect()
            end.record()
            torch.cuda.synchronize()
            whole.append(start.elapsed_time(end))
            assert all(isinstance(each, Chosen) for each in found)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        print(f"{name:26}{sorted(whole)[4]:6.2f} ms{sorted(host)[4] * 1e3:6.2f} ms{peak:6.0f} MiB")
