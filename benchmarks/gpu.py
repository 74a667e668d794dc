"""CUDA: an 8B shape with random weights, ours against transformers' continuous batching.

python -m benchmarks gpu [--layers 32] [--streams 1,8,64,256] [--peers 1,8,64,256] [--json FILE]
"""

import argparse
import gc
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig
from transformers import PreTrainedModel

from benchmarks.measuring import random_prompts
from benchmarks.measuring import run
from service.engine.engine import Engine
from service.engine.runner import Runner

PROMPT, OUTPUT = 128, 256


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
    return {name: tensor.to("cuda:0", non_blocking=True) for name, tensor in inputs.items()}


def ours(model: PreTrainedModel, streams: list[int], context: int) -> list[dict[str, Any]]:
    """Measured once each, after one run that is not counted."""
    runner = Runner(model, place_on_cuda, max_context=context, max_sequences=max(streams))
    engine = Engine(runner, max_queue=1024)
    began = time.perf_counter()
    engine.start()
    print(f"ours: ready after {time.perf_counter() - began:.1f} s, {engine.path}", flush=True)
    rows = []
    try:
        for count in streams:
            run(engine, random_prompts(count, PROMPT, 100_000, seed=count), 16)
            prompts = random_prompts(count, PROMPT, 100_000, seed=1000 + count)
            found = run(engine, prompts, OUTPUT)
            rows.append({"engine": "moorage", "streams": count, **vars(found)})
            print(rows[-1], flush=True)
    finally:
        engine.close()
    return rows


def floor(model: PreTrainedModel) -> float:
    """Steps a second if only the weights had to be read, at the rate of a large copy."""
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
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * 2
    print(f"copy rate {rate / 1e12:.2f} TB/s, floor {rate / weights:.0f} steps/s", flush=True)
    return float(rate / weights)


def peers(model: PreTrainedModel, streams: list[int]) -> list[dict[str, Any]]:
    """transformers' continuous batching with CUDA graphs and 4,096 tokens a batch: its best."""
    from transformers import ContinuousBatchingConfig
    from transformers import GenerationConfig

    rows = []
    for count in streams:
        settings = ContinuousBatchingConfig(
            use_cuda_graph=True, max_batch_tokens=4096, max_memory_percent=0.4
        )
        config = GenerationConfig(
            max_new_tokens=OUTPUT, do_sample=False, eos_token_id=-1, pad_token_id=2
        )
        for warm in (True, False):
            prompts = random_prompts(count, PROMPT, 100_000, seed=count + warm)
            began = time.perf_counter()
            outputs = model.generate_batch(
                inputs=prompts,
                generation_config=config,
                continuous_batching_config=settings,
                max_new_tokens=16 if warm else OUTPUT,
                record_timestamps=True,
            )
            seconds = time.perf_counter() - began
        total = sum(len(output.generated_tokens) for output in outputs.values())
        stamps = [output.timestamps for output in outputs.values() if output.timestamps]
        start, end = max(s[0] for s in stamps), min(s[-1] for s in stamps)
        inside = sum(sum(start < at <= end for at in s) for s in stamps)
        steady = inside / (end - start) if end > start else total / seconds
        rows.append(
            {
                "engine": "transformers continuous batching",
                "streams": count,
                "rate": total / seconds,
                "steady": steady,
                "seconds": seconds,
            }
        )
        print(rows[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks gpu", description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--streams", default="1,8,64,256")
    parser.add_argument("--peers", default="1,8,64,256")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    streams = [int(word) for word in args.streams.split(",")]
    model = model_8b(args.layers)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "floor": floor(model),
        "rows": ours(model, streams, PROMPT + OUTPUT + 128),
    }
    if args.peers:
        result["rows"] += peers(model, [int(word) for word in args.peers.split(",")])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
