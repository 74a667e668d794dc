"""What being sure costs: the certificate's share of a load, and how long plans take.

    python -m benchmarks load [--model smollm2-135m] [--strategy cpu] [--runs 5] [--json FILE]

Plans are of configs without weights, for machines that are not here: 70B and 671B parameters.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks import settings

# name -> transformers' class of the config, its values, and a machine that is large enough
LARGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama 3 70B": (
        "LlamaConfig",
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        "4x80GiB,ram=512GiB",
    ),
    # the class's own values are those of the 671B model
    "DeepSeek V3 671B": (
        "DeepseekV3Config",
        {"architectures": ["DeepseekV3ForCausalLM"]},
        "16x141GiB,ram=2048GiB",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, save JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="as in moorage.yaml")
    parser.add_argument("--strategy", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the result is saved")
    options = parser.parse_args(arguments)
    result = results.begin("load", settings.plain(options))
    proven = result["certificate"] = certificate(options.model, options.strategy, options.runs)
    sys.stdout.write(
        f"{options.model}: load {proven['load_s']:.2f} s, certificate {proven['certificate_s']:.3f}"
        f" s, {proven['share']:.1%} of the load\n"
    )
    result["plans"] = {}
    for name in LARGE:
        plan = result["plans"][name] = plan_time(name, options.runs)
        sys.stdout.write(
            f"{name}: plan of {plan['parameters'] / 1e9:.0f}B parameters on {plan['machine']} in "
            f"{plan['seconds']:.2f} s ({plan['low']:.2f}-{plan['high']:.2f})\n"
        )
    settings.save(options, result)
    return 0


def certificate(model: str, strategy: str, runs: int) -> dict[str, float]:
    """Medians in seconds of loading and of proving, each run in full."""
    from service.placement import certificate as proof
    from service.placement import hardware
    from service.placement import loading

    loads, proofs = [], []
    for _ in range(runs):
        chosen, settled = _settled({"model": model, "strategy": strategy}, fetch=True)
        placement = chosen.plan(settled, hardware.detect(settled.folder))
        loaded = loading.load(chosen, settled, placement, lambda share: None)
        made = proof.certify(loaded)
        if not made.valid:
            raise RuntimeError(f"{model} is not proven: {made.failure()}")
        loads.append(loaded.seconds)
        proofs.append(made.seconds)
        chosen.release(loaded.model)
        del loaded
    load, proven = statistics.median(loads), statistics.median(proofs)
    return {"load_s": load, "certificate_s": proven, "share": proven / load}


def plan_time(name: str, runs: int) -> dict[str, Any]:
    """Seconds of one plan of auto-shard, median, lowest and highest; torch is imported before."""
    import transformers

    from service.placement import hardware

    kind, values, machine = LARGE[name]
    seconds = []
    with tempfile.TemporaryDirectory(prefix="moorage-benchmark-") as folder:
        config = getattr(transformers, kind)(**values, dtype="bfloat16")
        config.save_pretrained(folder)
        for _ in range(runs):
            began = time.perf_counter()
            chosen, settled = _settled({"model": folder, "strategy": "auto-shard"}, fetch=False)
            placement = chosen.plan(settled, hardware.invent(machine))
            seconds.append(time.perf_counter() - began)
    return {
        "machine": machine,
        "parameters": placement.parameters,
        "seconds": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
    }


def _settled(words: Mapping[str, str], *, fetch: bool) -> tuple[Any, Any]:
    """The strategy and the deployment it gets. fetch: the weights must be here."""
    from service.config import reading
    from service.models.locate import locate
    from service.models.locate import locate_for_plan
    from service.placement.chain import steps

    given = tuple((key, value, "benchmark") for key, value in words.items())
    config = reading.load(None, {}, reading.Flags(settings=given))
    _, (first, *_) = steps(config)
    return first.strategy, first.settle(locate(config) if fetch else locate_for_plan(config))
