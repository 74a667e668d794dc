"""A strategy that works until its control file says otherwise (tests/faults/control.py)."""

from pathlib import Path

from pydantic import BaseModel
from pydantic import ConfigDict

from service.placement import checks
from service.placement import planning
from service.placement.hookspecs import hookimpl
from service.placement.inputs import to_input_device


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    control: Path
    paged: bool = False


@hookimpl
def plan(config, hardware):
    return planning.on_one_device(config, hardware, "cpu")


@hookimpl
def load(config, placement):
    from transformers import AutoModelForCausalLM

    from tests.faults import seam

    model = AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)
    seam.install(model, config.options.control)
    if config.options.paged:
        seam.use_pages()
    return model


@hookimpl
def validate(model, placement):
    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    from tests.faults import seam

    return seam.placed(to_input_device(model, inputs))
