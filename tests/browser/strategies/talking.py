"""A strategy that loads when a test lets it, and whose model slowly says the same letter."""

import time
from pathlib import Path

from service.placement import checks
from service.placement import planning
from service.placement.hookspecs import hookimpl
from service.placement.inputs import to_input_device

LETTER = "a"
# it loads when this file is in the server's folder
GATE = Path("gate")
POLL_S = 0.05
STEP_S = 0.05
"""What every step takes at least."""


@hookimpl
def plan(config, hardware):
    return planning.on_one_device(config, hardware, "cpu")


@hookimpl
def load(config, placement):
    from transformers import AutoModelForCausalLM

    while not GATE.exists():
        time.sleep(POLL_S)
    model = AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)

    def letter(module, args, output):
        output[..., ord(LETTER)] += 1000.0
        return output

    model.register_forward_pre_hook(lambda module, args: time.sleep(STEP_S))
    model.get_output_embeddings().register_forward_hook(letter)
    return model


@hookimpl
def validate(model, placement):
    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    return to_input_device(model, inputs)
