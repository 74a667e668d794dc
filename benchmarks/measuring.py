"""Prompts through an engine in this process, and what came out how fast."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.engine.engine import Engine
from service.engine.params import SamplingParams

SAMPLE_S = 0.02


@dataclass(frozen=True)
class Measured:
    """One run. Times in seconds, rates in output tokens a second.

    rate: all output tokens over the whole time, prefill included. steady: while all sequences ran
    and no prompt was being computed.
    """

    rate: float
    steady: float
    seconds: float


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids, every prompt another."""
    generator = torch.Generator().manual_seed(seed)
    low = min(10, vocabulary - 1)
    return torch.randint(low, vocabulary, (count, length), generator=generator).tolist()


def run(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
    """Submit all prompts at once, greedy, `tokens` each, and read them to the end."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    samples: list[tuple[float, int, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            stats = engine.stats()
            samples.append((time.perf_counter(), stats.tokens, stats.prompt_tokens))

    watcher = threading.Thread(target=watch, daemon=True)
    before = engine.stats()
    began = time.perf_counter()
    watcher.start()
    streams = [engine.submit(prompt, params) for prompt in prompts]
    total = 0
    for stream in streams:
        while arrived := stream.read(600):
            total += len(arrived)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    if total != tokens * len(prompts):
        raise RuntimeError(f"{total} tokens came, {tokens * len(prompts)} were asked for")
    prompt_tokens = max((p for _, _, p in samples), default=0)
    decoding = [(t, n) for t, n, p in samples if p == prompt_tokens]
    decoding = [(t, n) for t, n in decoding if n - before.tokens < total]
    rate = total / seconds
    steady = rate
    if len(decoding) >= 2 and decoding[-1][0] > decoding[0][0]:
        steady = (decoding[-1][1] - decoding[0][1]) / (decoding[-1][0] - decoding[0][0])
    return Measured(rate, steady, seconds)
