"""`python -m benchmarks NAME [options]`: what can be measured, and tables and plots of results."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "engine": "in process, CPU: ours against its peers at 1 to 32 streams, then latency under load",
    "serve": "over HTTP, CPU: ours against servers of others, streaming clients",
    "constrained": "over HTTP, CPU: what a stream bound to a schema costs those beside it",
    "gpu": "CUDA, an 8B shape with random weights: ours against transformers",
    "step": "CUDA: where one decode step goes",
    "load": "the certificate's share of a load, and how long plans for large models take",
    "linears": "CPU linear layers in each format",
    "quality": "perplexity of each CPU weight format",
    "soak": "over HTTP, CPU: mixed and faulty clients for a long time, and whether anything leaks",
    "table": "the README's table from benchmarks/results",
    "plot": "benchmarks/results/*.png from benchmarks/results/*.json",
}


def usage() -> str:
    """What there is, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: python -m benchmarks NAME [options]", "", *lines, ""])


def main(arguments: Sequence[str]) -> int:
    """Run one of COMMANDS. Returns the exit status: 2 for a name that there is not."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        sys.stderr.write(f"there is no benchmark {name!r}\n{usage()}")
        return 2
    status: int | None = importlib.import_module(f"benchmarks.{name}").main(rest)
    return status or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
