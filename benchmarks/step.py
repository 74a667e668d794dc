"""Where one decode step on CUDA goes: the graph alone, with choosing, and by kernel.

python -m benchmarks step [--layers 32] [--streams 1,64,256]
"""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.gpu import model_8b
from benchmarks.gpu import place_on_cuda
from benchmarks.measuring import random_prompts
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Batch
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.engine.sequence import Stream

STEPS = 40


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks step", description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--streams", default="1,64,256")
    args = parser.parse_args(arguments)
    streams = [int(word) for word in args.streams.split(",")]
    model = model_8b(args.layers)
    for count in streams:
        runner = Runner(model, place_on_cuda, max_context=512, max_sequences=count)
        runner.open()
        one(runner, count)
        runner.release()
        torch.cuda.empty_cache()


def one(runner: Runner, count: int) -> None:
    scheduler = Scheduler(
        runner.path.memory, max_sequences=count, max_queue=0, step_tokens=runner.path.step_tokens
    )
    params = SamplingParams(max_tokens=300, temperature=0.0)
    prompts = random_prompts(count, 128, 100_000, seed=1)
    scheduler.add(
        tuple(Sequence(i, tuple(p), params, Stream(1)) for i, p in enumerate(prompts)), step_s=0.0
    )

    def step() -> Batch:
        batch = scheduler.next_batch(0.0, 2048)
        if batch is None:
            raise RuntimeError("nothing to run")
        for piece, result in runner.collect(runner.launch(batch)):
            scheduler.record(piece, getattr(result, "token", None))
        return batch

    began = time.perf_counter()
    steps = 0
    while step().prefills:
        steps += 1
    print(f"{count}: prefill {steps} steps, {(time.perf_counter() - began) * 1e3:.0f} ms")
    print(f"{count}: step, each waited for  {timed(step):.2f} ms")
    batch = scheduler.next_batch(0.0, 2048)
    graphs = runner.path.graphs
    if batch is None or graphs is None:
        return
    with torch.inference_mode():
        graphs.replay(batch)
        follow = scheduler.batch_after(batch, 0.0)
        if follow is None:
            raise RuntimeError("nothing follows")
        print(f"{count}: graph replay only      {timed(lambda: graphs.replay(follow)):.2f} ms")
        profile(lambda: graphs.replay(follow))


def timed(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS * 1e3


def profile(step: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    for row in sorted(found.key_averages(), key=lambda its: -its.device_time_total)[:14]:
        print(f"  {row.device_time_total / 3e3:8.3f} ms  {row.count // 3:5d} x  {row.key[:90]}")


if __name__ == "__main__":
    main()
