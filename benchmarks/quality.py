"""What a weight format costs in quality: perplexity on a text that we ship.

    python -m benchmarks quality [--formats none int8 int4 nf4] [--json]

Every format is loaded as `strategy: cpu` serves it. The text is benchmarks/texts/placement.txt,
plain English from our own documentation, read in windows that do not overlap.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent / "texts" / "placement.txt"
FORMATS = ("none", "int8", "int4", "nf4")
WINDOW = 512


def perplexity(model: Any, ids: Sequence[int], window: int = WINDOW) -> float:
    """exp of the mean negative log likelihood of each token but the first of its window."""
    import torch

    lost, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, window):
            part = torch.tensor([ids[start : start + window]])
            logits = model(input_ids=part, use_cache=False).logits[0, :-1].float()
            lost += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
            count += part.shape[1] - 1
    return math.exp(lost / count)


def load(folder: Path, quantize: str) -> tuple[Any, int]:
    """The model as strategy cpu serves it in this format, and its bytes of weights."""
    from service.config.schema import ModelConfig
    from service.placement import hardware
    from service.placement import loading
    from service.placement import registry

    strategy = registry.build().select("cpu")
    config = ModelConfig(
        deployment="quality",
        model_id=folder.name,
        folder=folder,
        model=str(folder),
        quantize=quantize,
        options={"pack": "off"},
        max_context=WINDOW,
        max_sequences=1,
    )
    settled = registry.settle(config, strategy, {})
    placement = strategy.plan(settled, hardware.detect(folder))
    loaded = loading.load(strategy, settled, placement, lambda share: None)
    return loaded.model, placement.memory["cpu"].weights


def measure(folder: Path, formats: Sequence[str] = FORMATS) -> dict[str, Any]:
    """Format -> perplexity and bytes of weights."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    found: dict[str, Any] = {"text": TEXT.name, "tokens": len(ids), "window": WINDOW, "formats": {}}
    for quantize in formats:
        model, size = load(folder, quantize)
        found["formats"][quantize] = {"perplexity": perplexity(model, ids), "weights": size}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or JSON with --json. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    cached = Path.home() / ".cache" / "moorage" / "models" / "smollm2-135m"
    parser.add_argument("--model", type=Path, default=cached, help="folder of the model")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = measure(options.model, options.formats)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    first = next(iter(found["formats"].values()))["perplexity"]
    sys.stdout.write(f"{found['tokens']} tokens of {found['text']}\n")
    for name, row in found["formats"].items():
        more = row["perplexity"] / first - 1
        sys.stdout.write(
            f"{name:8} {row['perplexity']:8.3f} {more:+8.2%} {row['weights'] / 2**20:8.1f} MiB\n"
        )
    return 0
