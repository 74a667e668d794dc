"""CUDA: an 8B shape with random weights, ours against transformers' continuous batching.

    python -m benchmarks gpu [--layers 32] [--streams 1,8,64,256] [--runs 3] [--json FILE]

Short prompts (128 tokens, answers of 256) for both; for ours also long prompts (2,048, answers of
128), prompts with and without a common beginning, and how long newcomers wait beside others.
Answers are greedy and never end early. What warms up is not counted.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig
from transformers import PreTrainedModel

from benchmarks import figures
from benchmarks import results
from benchmarks.engine import wait_times
from benchmarks.measuring import Measured
from benchmarks.measuring import random_prompts
from benchmarks.measuring import run
from benchmarks.peers import InProcess
from benchmarks.settings import say
from benchmarks.settings import whole_numbers
from benchmarks.workload import ids
from service.engine.engine import Engine
from service.engine.runner import Runner

OURS, COMPILED = "moorage", "moorage, compile: true"
PEER = "transformers continuous batching"
# tokens of prompt and answer
SHORT, LONG = (128, 256), (2048, 128)
LENGTHS = {"short": SHORT, "long": LONG}
LONG_STREAMS = (1, 8, 64)
# sequences of so many tokens, most of them the same, and answers of so many
SHARED_STREAMS, SHARED, OWN, SHARED_ANSWER = 64, 1024, 64, 128
LATENCY_STREAMS, LATENCY_ANSWER, LATENCY_PROMPT = 32, 640, 4096
VOCABULARY = 100_000
WARM_ANSWER = 16


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--layers", type=int, default=32)
    streams: dict[str, Any] = {"type": whole_numbers, "default": [1, 8, 64, 256]}
    made.add_argument("--streams", **streams, help="of short prompts; ours")
    made.add_argument("--peers", **streams, help="the same; theirs, once each")
    made.add_argument("--runs", type=int, default=3, help="of ours")
    made.add_argument(
        "--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to measure"
    )
    made.add_argument("--json", type=Path)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, save JSON after every part. Returns the exit status."""
    options = parser().parse_args(arguments)
    settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
    result = results.begin("gpu", settings)
    result["device"] = torch.cuda.get_device_name(0)
    result["engines"] = {OURS: _versions(), PEER: _versions()}
    model = model_8b(options.layers)
    result["copy_bytes_per_s"] = copy_rate()
    for name in options.only:
        PARTS[name](model, options, result)
        if options.json:
            results.save(options.json, result)
    say(table(result))
    return 0


def model_8b(layers: int) -> PreTrainedModel:
    """Llama 3 8B's shape, random bf16 weights on cuda:0."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
    )
    with torch.device("cuda:0"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def place_on_cuda(
    *, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The hook of a strategy that has the whole model on cuda:0."""
    return {name: tensor.to("cuda:0", non_blocking=True) for name, tensor in inputs.items()}


def copy_rate() -> float:
    """Bytes a second that a large copy reads and writes."""
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda:0")
    other = torch.empty_like(big)
    for _ in range(3):
        other.copy_(big)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        other.copy_(big)
    torch.cuda.synchronize()
    rate = 10 * 2 * 2**31 / (time.perf_counter() - began)
    say(f"copies move {rate / 1e12:.2f} TB/s")
    return rate


def short(model: PreTrainedModel, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Ours at all numbers of streams, run by run."""
    _runs(model, options, result, "short", options.streams)


def compiled(model: PreTrainedModel, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """As `short` and `latency`, of a deployment with `compile: true`."""
    _runs(model, options, result, "short", options.streams, compiled=True)
    result["compiled_latency"] = _latency(model, result, compiled=True)


def long(model: PreTrainedModel, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Ours with long prompts."""
    _runs(model, options, result, "long", LONG_STREAMS)


def _runs(
    model: PreTrainedModel,
    options: argparse.Namespace,
    result: dict[str, Any],
    workload: str,
    streams: Sequence[int],
    *,
    compiled: bool = False,
) -> None:
    lengths, name = LENGTHS[workload], COMPILED if compiled else OURS
    with serving(model, sum(lengths) + 128, max(streams), result, compiled=compiled) as engine:
        for number in range(options.runs):
            for count in streams:
                row = measure(engine, lengths, count, number)
                add(result, model, name, workload, count, number, row)


def shared(model: PreTrainedModel, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Prompts that begin alike, and as many that do not."""
    lengths = SHARED + OWN, SHARED_ANSWER
    with serving(model, sum(lengths) + 128, SHARED_STREAMS, result) as engine:
        for number in range(options.runs):
            row = measure(engine, lengths, SHARED_STREAMS, number)
            add(result, model, OURS, "nothing in common", SHARED_STREAMS, number, row)
            (common,) = random_prompts(1, SHARED, VOCABULARY, seed=5000 + number)
            own = random_prompts(SHARED_STREAMS, OWN, VOCABULARY, seed=6000 + number)
            row = run(engine, [common + rest for rest in own], SHARED_ANSWER)
            add(result, model, OURS, "common beginning", SHARED_STREAMS, number, row)


def latency(model: PreTrainedModel, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """First tokens of newcomers beside running streams, and what they cost those."""
    result["latency"] = _latency(model, result, compiled=False)


def _latency(model: PreTrainedModel, result: dict[str, Any], *, compiled: bool) -> dict[str, Any]:
    asked = argparse.Namespace(
        latency=LATENCY_STREAMS, long_prompt=LATENCY_PROMPT, latency_answer=LATENCY_ANSWER
    )
    context = LATENCY_PROMPT + LATENCY_ANSWER
    with serving(model, context, LATENCY_STREAMS + 1, result, compiled=compiled) as engine:
        found = wait_times(asked, InProcess(engine), ids)
    say(str(found))
    return found


def peers(model: PreTrainedModel, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """transformers' continuous batching with CUDA graphs and 4,096 tokens a batch: its best."""
    from transformers import ContinuousBatchingConfig
    from transformers import GenerationConfig

    prompt, answer = SHORT
    for count in options.peers:
        settings = ContinuousBatchingConfig(
            use_cuda_graph=True, max_batch_tokens=4096, max_memory_percent=0.4
        )
        config = GenerationConfig(
            max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=2
        )
        for warm in (True, False):
            began = time.perf_counter()
            outputs = model.generate_batch(
                inputs=random_prompts(count, prompt, VOCABULARY, seed=count + warm),
                generation_config=config,
                continuous_batching_config=settings,
                max_new_tokens=WARM_ANSWER if warm else answer,
                record_timestamps=True,
            )
            seconds = time.perf_counter() - began
        total = sum(len(output.generated_tokens) for output in outputs.values())
        stamps = [output.timestamps for output in outputs.values() if output.timestamps]
        start, end = max(s[0] for s in stamps), min(s[-1] for s in stamps)
        inside = sum(sum(start < at <= end for at in s) for s in stamps)
        steady = inside / (end - start) if end > start else total / seconds
        found = Measured(total / seconds, steady, seconds)
        add(result, model, PEER, "short", count, 0, found)
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def serving(
    model: PreTrainedModel,
    context: int,
    streams: int,
    result: dict[str, Any],
    *,
    compiled: bool = False,
) -> Iterator[Engine]:
    """Our engine over the model, and how long it took and what it kept to get ready."""
    runner = Runner(
        model, place_on_cuda, max_context=context, max_sequences=streams, compiled=compiled
    )
    engine = Engine(runner, max_queue=1024)
    began, outside = time.perf_counter(), _outside()
    engine.start()
    took = time.perf_counter() - began
    kept = {
        "context": context,
        "streams": streams,
        "ready_s": took,
        "path": engine.path,
        "kv_bytes": sum(runner.path.kv_bytes.values()),
        "outside_bytes": _outside() - outside,
        "compiled": compiled,
    }
    say(f"ready: {kept}")
    result.setdefault("starts", []).append(kept)
    try:
        yield engine
    finally:
        engine.close()
        gc.collect()
        torch.cuda.empty_cache()


def _outside() -> int:
    """Bytes of the card that are taken, but not by torch's allocator."""
    free, total = torch.cuda.mem_get_info(0)
    return total - free - torch.cuda.memory_reserved(0)


def measure(engine: Engine, lengths: tuple[int, int], count: int, number: int) -> Measured:
    """One run with prompts that nobody has seen; before the first, a short one."""
    prompt, answer = lengths
    if not number:
        run(engine, random_prompts(count, prompt, VOCABULARY, seed=count), WARM_ANSWER)
    fresh = random_prompts(count, prompt, VOCABULARY, seed=1000 * (number + 1) + count)
    return run(engine, fresh, answer)


def add(
    result: dict[str, Any],
    model: PreTrainedModel,
    engine: str,
    workload: str,
    streams: int,
    number: int,
    found: Measured,
) -> None:
    """A row, and the share of the copy rate at which its steady steps read weights and KV."""
    lengths = LENGTHS.get(workload, (SHARED + OWN, SHARED_ANSWER))
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * 2  # a row a token
    bytes_a_step = weights + streams * (lengths[0] + lengths[1] // 2) * token
    row = {
        "engine": engine,
        "workload": workload,
        "streams": streams,
        "run": number,
        **asdict(found),
        "floor_share": found.steady / streams * bytes_a_step / result["copy_bytes_per_s"],
    }
    result["rows"].append(row)
    say(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()))


def table(result: Mapping[str, Any]) -> str:
    """Markdown: output tokens a second while all run, and with the prompts, medians."""
    lines = ["| workload | streams | engine | steady | whole | of the floor |", "| --- " * 6 + "|"]
    keys = dict.fromkeys((r["workload"], r["streams"], r["engine"]) for r in result["rows"])
    for workload, streams, engine in keys:
        rows = [
            row
            for row in result["rows"]
            if (row["workload"], row["streams"], row["engine"]) == (workload, streams, engine)
        ]
        steady, rate, share = (
            figures.spread([row[name] for row in rows])["median"]
            for name in ("steady", "rate", "floor_share")
        )
        lines.append(
            f"| {workload} | {streams} | {engine} | {steady:,.0f} | {rate:,.0f} | {share:.0%} |"
        )
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


PARTS = {
    "short": short,
    "long": long,
    "shared": shared,
    "latency": latency,
    "peers": peers,
    "compiled": compiled,
}


if __name__ == "__main__":
    raise SystemExit(main())
