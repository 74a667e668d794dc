"""Options that `engine` and `serve` share, and the model they measure with."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.workload import Lengths
from service.config.compute_threads import compute_environment
from service.config.compute_threads import usable_cores


def whole_numbers(text: str) -> list[int]:
    """ "1,8,32" as numbers, each at least 1. Raises ArgumentTypeError."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers from 1, such as 1,8,32")
    return found


def least_and_most(text: str) -> tuple[int, int]:
    """ "64,256" as a range. Raises ArgumentTypeError."""
    found = whole_numbers(text)
    if len(found) != 2 or found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: write the least and the most, such as 64,256")
    return found[0], found[1]


def add(parser: argparse.ArgumentParser, *, streams: str) -> None:
    """The shared options."""
    add_where(parser)
    parser.add_argument("--streams", type=whole_numbers, default=whole_numbers(streams))
    parser.add_argument("--runs", type=int, default=3, help="of everything, one after the other")
    parser.add_argument("--prompt", type=least_and_most, default=(64, 256), metavar="LEAST,MOST")
    parser.add_argument("--answer", type=least_and_most, default=(64, 128), metavar="LEAST,MOST")
    parser.add_argument("--least-requests", type=int, default=4, help="of a run with few streams")


def add_where(parser: argparse.ArgumentParser) -> None:
    """What is measured, on how many threads, and where the result goes."""
    cores = int(compute_environment(usable_cores())["OMP_NUM_THREADS"])
    parser.add_argument("--model", default="smollm2-135m", help="as in moorage.yaml")
    parser.add_argument("--threads", type=int, default=cores, help="that compute, of every engine")
    parser.add_argument("--json", type=Path, help="where the result is saved")


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON has them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}


def save(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Where --json says, if it says."""
    if options.json:
        results.save(options.json, result)


def lengths(options: argparse.Namespace) -> Lengths:
    """Of prompts and answers."""
    return Lengths(options.prompt, options.answer)


def find_model(words: str) -> Path:
    """The folder of a model, fetched if it is one that `moorage model list` knows."""
    from service.config import reading
    from service.models.locate import locate

    flags = reading.Flags(settings=(("model", words, "--model"),))
    return locate(reading.load(None, {}, flags)).folder


def say(text: str) -> None:
    """Progress, beside the result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
