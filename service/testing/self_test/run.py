"""Every failure class, tried with the libraries that are installed here.

`moorage doctor --self-test` runs this in a process of its own, because one reproduction poisons the
process. Tiny random models, some seconds. Prints one JSON object a line, fields of `Outcome`.
"""

import dataclasses
import gc
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from service.placement import finding
from service.placement import guard
from service.testing.self_test import loads
from service.testing.self_test import maps
from service.testing.self_test import quantised
from service.testing.self_test import serving
from service.testing.self_test import values
from service.testing.self_test.outcome import NotTried
from service.testing.self_test.outcome import Outcome
from service.testing.tiny import save_tiny


@dataclasses.dataclass(frozen=True)
class Trial:
    """A class, what plain libraries do, how to find out, and the tiny Llama it is tried with."""

    failure_class: str
    what: str
    attempt: Callable[[Path], tuple[bool, bool | None]]
    tie: bool = False
    layers: int = 4


TRIALS = (
    Trial("F1", "a weight on meta answers without an error", values.parameter_on_meta),
    Trial("F2", "a buffer stays on meta and all keys match", values.buffer_on_meta),
    Trial("F3", "a buffer is left with what was in memory", values.buffer_of_junk),
    Trial("F4", "two loads at once break every later one", loads.overlapping, tie=True),
    Trial("F5", "a load changes what other threads build", loads.seen_by_every_thread),
    Trial("F6", "two threads fail over offload hooks", serving.two_threads),
    Trial("F7", "inputs sent to model.device land on meta", serving.inputs_to_model_device),
    Trial("F8", "a tied pair on two devices dies when asked", maps.tied_pair_apart, tie=True),
    Trial("F9", "a map's layers.1 takes layers.10 too", maps.key_that_begins_alike, layers=12),
    Trial("F10", "an incomplete map is taken in silence", maps.incomplete_map, layers=2),
    Trial("F11", "max_memory without cpu means the disk", maps.memory_without_cpu),
    Trial("F12", "a whole model goes to disk unasked", maps.silent_offload),
    Trial("F13", "4-bit in name only", quantised.in_name_only),
    Trial("F14", "a 4-bit layer loads and cannot run", quantised.cannot_run),
    Trial("F15", "a missing tensor is random instead", values.missing_tensor),
    Trial("F16", "a weight that was written into is used", values.other_values),
    Trial("F17", "without its hooks a model answers garbage", serving.hooks_removed),
    Trial("F18", "half() casts a dispatched model in silence", serving.cast_after_dispatch),
    Trial("F19", 'device_map="meta" loads nothing in silence', maps.device_not_there),
    Trial("F20", "memory is planned without the KV cache", maps.weights_only),
    Trial("F21", "a kept error keeps the half-loaded model", loads.kept_by_an_error),
    Trial("F22", "the main device follows a hash", maps.random_main_device),
)


def run(folder: Path) -> Iterator[Outcome]:
    """Every class, each with a model of its own below `folder`. Poisons the process."""
    for trial in TRIALS:
        place = folder / trial.failure_class
        model = save_tiny(place / "model", "llama", tie=trial.tie, layers=trial.layers)
        yield _tried(trial, model)
        guard.heal()
        gc.collect()


def _tried(trial: Trial, model: Path) -> Outcome:
    there: bool | None = None
    caught: bool | None = None
    why: str | None = None
    try:
        there, caught = trial.attempt(model)
    except NotTried as error:
        why = str(error)
    except Exception as error:  # another version of a library may do anything; say which class
        caught, why = False, finding.describe(error)
    return Outcome(trial.failure_class, trial.what, there, caught, why)


def main() -> None:
    """Print the outcomes, one JSON object a line, each as soon as it is known."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="moorage-self-test-") as folder:
        for outcome in run(Path(folder)):
            body: dict[str, Any] = dataclasses.asdict(outcome)
            sys.stdout.write(json.dumps(body) + "\n")
            sys.stdout.flush()
