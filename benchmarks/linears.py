"""How fast a model's linear layers are on this CPU, in each format, against each other.

    python -m benchmarks linears [--shapes 135m 1b] [--rows 1 8 32]

Random weights of a real shape, all layers one after the other, so that weights come from memory as
they do in a step; layers that read the same tensor do so here. One thread; formats alternate in
random order within one process; what counts are the ratios of neighbours in time.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

# name -> layers; columns in, rows of q, of k and v, of gate and up; rows of the head
SHAPES = {
    "135m": (30, (576, 576, 192, 1536), 49152),
    # three of sixteen layers, enough to leave every cache, and as much of its 128k tokens
    "1b": (3, (2048, 2048, 512, 8192), 24576),
}
FORMATS = ("stock", "packed", "int8", "int4")


def build(shape: str, name: str, seed: int = 0) -> Any:
    """The linears of a shape in one format, in bfloat16: a module called with one tensor
    [1, rows, columns], in which those of a layer read the same tensors as in a Llama.
    """
    import torch
    from torch import nn

    from service.placement import cpu_linears

    torch.manual_seed(seed)
    layers, (width, query, key, inner), vocabulary = SHAPES[shape]

    class Layer(nn.Module):
        q: nn.Module
        k: nn.Module
        v: nn.Module
        o: nn.Module
        gate: nn.Module
        up: nn.Module
        down: nn.Module

        def __init__(self) -> None:
            super().__init__()
            for own, (rows, columns) in {
                "q": (query, width),
                "k": (key, width),
                "v": (key, width),
                "o": (width, query),
                "gate": (inner, width),
                "up": (inner, width),
                "down": (width, inner),
            }.items():
                linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
                self.add_module(own, linear)

        def forward(self, x: Any) -> Any:
            q, _, _ = self.q(x), self.k(x), self.v(x)
            x = self.o(q)
            gate, _ = self.gate(x), self.up(x)
            return self.down(gate)

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.head = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16)

        def get_output_embeddings(self) -> Any:
            return self.head

        def forward(self, x: Any = None, *, input_ids: Any = None, use_cache: bool = False) -> Any:
            if x is None:
                x = torch.zeros(*input_ids.shape, width, dtype=torch.bfloat16)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model = Linears().requires_grad_(False)
    if name == "packed":
        cpu_linears.pack(model)
    elif name != "stock":
        cpu_linears.quantise(model, name)
    return model


def timed(model: Any, x: Any) -> float:
    """Seconds of this thread in one pass: what other programs take of the core does not count."""
    started = time.thread_time()
    model(x)
    return time.thread_time() - started


def compare(run: Callable[[str], float], names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Name -> median and quartiles in ms of `run`, interleaved, and its speed against the first.

    ratio is the median over the repeats of the first's time by its own, of neighbours in time.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        run(name)  # kernels are chosen in the first call
    for _ in range(repeats):
        for name in random.sample(names, len(names)):
            times[name].append(run(name))
    found = {}
    for name, own in times.items():
        ratios = [first / mine for first, mine in zip(times[names[0]], own, strict=True)]
        low, middle, high = statistics.quantiles(own, n=4)
        found[name] = {
            "ms": round(middle * 1e3, 3),
            "quartiles_ms": [round(low * 1e3, 3), round(high * 1e3, 3)],
            "ratio": round(statistics.median(ratios), 3),
        }
    return found


def measure(shape: str, rows: Sequence[int], repeats: int) -> dict[str, Any]:
    """Rows -> format -> times and ratio to stock, for one shape."""
    import torch

    torch.set_num_threads(1)
    models = {name: build(shape, name) for name in FORMATS}
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for count in rows:
            x = torch.randn(1, count, SHAPES[shape][1][0], dtype=torch.bfloat16)

            def run(name: str, x: Any = x) -> float:
                return timed(models[name], x)

            found[str(count)] = compare(run, FORMATS, max(3, repeats // (1 + count // 32)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print JSON; a table goes to stderr. Returns the exit status."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks linears", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["135m"], choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32, 128])
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "shapes": {},
    }
    for shape in options.shapes:
        found["shapes"][shape] = measured = measure(shape, options.rows, options.repeats)
        for count, row in measured.items():
            words = "  ".join(f"{name} {row[name]['ratio']:.2f}" for name in FORMATS)
            sys.stderr.write(f"{shape}, {count} rows, speed against stock: {words}\n")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0
