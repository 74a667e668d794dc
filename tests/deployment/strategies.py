"""Strategy files: one that works, hook by hook, and what replaces a hook of it."""

from pathlib import Path

# each hook as in a strategy that works; a fault replaces some of them
HOOKS = {
    "plan": """
@hookimpl
def plan(config, hardware):
    return planning.on_one_device(config, hardware, "cpu")
""",
    "load": """
@hookimpl
def load(config, placement):
    return loaded(config, placement)
""",
    "validate": """
@hookimpl
def validate(model, placement):
    checks.placed_as_planned(model, placement)
""",
    "place_inputs": """
@hookimpl
def place_inputs(model, inputs):
    return to_input_device(model, inputs)
""",
}
HEAD = '''"""A strategy of a test."""

from service.placement import checks, planning
from service.placement.hookspecs import hookimpl
from service.placement.inputs import to_input_device


def loaded(config, placement):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)

'''


ARGUMENTS = {
    "plan": "config, hardware",
    "load": "config, placement",
    "validate": "model, placement",
    "place_inputs": "model, inputs",
    "release": "model",
}


def hook(name: str, *lines: str) -> dict[str, str]:
    """The hook of that name with another body."""
    body = "\n    ".join(lines)
    return {name: f"\n@hookimpl\ndef {name}({ARGUMENTS[name]}):\n    {body}\n"}


def load_then(*lines: str) -> dict[str, str]:
    """The hook `load` that loads, does more and returns the model."""
    return hook("load", "model = loaded(config, placement)", *lines, "return model")


def beside(text: str) -> dict[str, str]:
    """More in the file, beside the hooks."""
    return {"beside": f"\n{text}\n"}


def write(folder: Path, name: str, hooks: dict[str, str]) -> None:
    """A strategy file; `name` has dashes. hooks: what is put in place of HOOKS, or beside them."""
    folder.mkdir(exist_ok=True)
    text = HEAD + "\n".join({**HOOKS, **hooks}.values())
    (folder / f"{name.replace('-', '_')}.py").write_text(text)


KEEPING = """
kept = []


@hookimpl
def load(config, placement):
    model = loaded(config, placement)
    model.lm_head.to("meta")
    kept.append(model)
    return model
"""
RELEASING = """

@hookimpl
def release(model):
    kept.remove(model)
"""

HANGING = """
from tests.support.gates import gate


@hookimpl
def {hook}({arguments}):
    gate("{name}").pass_through()
    return {result}
"""
HANGS = {
    "plan": ("config, hardware", 'planning.on_one_device(config, hardware, "cpu")'),
    "load": ("config, placement", "loaded(config, placement)"),
    "validate": ("model, placement", "None"),
    "place_inputs": ("model, inputs", "to_input_device(model, inputs)"),
}
