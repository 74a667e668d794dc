"""Strategies that fail, stage by stage, and what must be said of each."""

from dataclasses import dataclass

from tests.deployment.strategies import beside
from tests.deployment.strategies import hook
from tests.deployment.strategies import load_then


@dataclass(frozen=True)
class Fault:
    """What is wrong with a strategy, the stage in which it shows, and what is said of it.

    twin: another file has the same name. loads: whether it gets as far as a model.
    """

    stage: str
    hooks: dict[str, str]
    says: tuple[str, ...]
    code: str = "plugin_error"
    failure_class: str | None = None
    tensors: tuple[str, ...] = ()
    twin: bool = False


OPTIONS = """
from pydantic import BaseModel, field_validator


class Options(BaseModel):
    layers: int = 0

    @field_validator("layers", mode="before")
    @classmethod
    def checked(cls, value):
        raise OSError("no such table")

    model_config = {"validate_default": True}
"""
RELEASE_RAISES = hook("release", "raise OSError('stuck')")
ONLY_BEFORE_THE_ENGINE = """
def only_before_the_engine(model, inputs):
    import threading

    if threading.current_thread().name == "engine":
        raise OSError("the kernel is gone")
"""

FAULTS = {
    # --- before anything is loaded
    "imports-what-is-not-there": Fault(
        "import",
        beside("import tritonx"),
        ("strategy imports-what-is-not-there failed to import: No module named 'tritonx'",),
    ),
    "leaves-at-import": Fault(
        "import",
        beside("raise SystemExit(2)"),
        ("strategy leaves-at-import failed to import: SystemExit: 2", "leaves_at_import.py:"),
    ),
    "lacks-a-hook": Fault("import", {"validate": ""}, ("strategy lacks-a-hook lacks validate",)),
    "has-a-twin": Fault("select", {}, ("2 strategies are called has-a-twin: ",), twin=True),
    "options-raise": Fault(
        "options",
        beside(OPTIONS),
        ("strategy options-raise: Options raised OSError: no such table", "options_raise.py:"),
    ),
    # --- plan
    "plan-raises": Fault(
        "plan",
        hook("plan", "return 1 / 0"),
        ("strategy plan-raises: plan raised ZeroDivisionError", "plan_raises.py:"),
    ),
    "plan-leaves": Fault(
        "plan", hook("plan", "raise SystemExit"), ("strategy plan-leaves: plan raised SystemExit",)
    ),
    "plan-returns-a-map": Fault(
        "plan",
        hook("plan", "return {'': 'cpu'}"),
        ("strategy plan-returns-a-map: plan returned {'': 'cpu'}; it must return a Placement",),
    ),
    "plan-returns-none": Fault(
        "plan",
        hook("plan", "pass"),
        ("strategy plan-returns-none: plan returned None; it must return a Placement",),
    ),
    "plan-refuses": Fault(
        "plan",
        hook("plan", "return planning.on_one_device(config, hardware, 'cuda:7')"),
        ("cuda:7",),
        "placement_unavailable",
        "F19",
    ),
    # --- load
    "load-raises": Fault(
        "load",
        load_then("raise RuntimeError('the cable is out')"),
        ("strategy load-raises: load raised RuntimeError: the cable is out", "load_raises.py:"),
        "load_failed",
    ),
    "load-leaves": Fault(
        "load",
        load_then("raise SystemExit(1)"),
        ("strategy load-leaves: load raised SystemExit: 1",),
        "load_failed",
    ),
    "load-returns-none": Fault(
        "load",
        hook("load", "pass"),
        ("strategy load-returns-none: load returned None; it must return the model",),
    ),
    "load-returns-a-dict": Fault(
        "load",
        load_then("model = model.config.to_dict()"),
        ("strategy load-returns-a-dict: load returned {", "it must return the model"),
    ),
    "loads-half": Fault(
        "load",
        hook(
            "load",
            "from transformers import AutoModelForCausalLM",
            "return AutoModelForCausalLM.from_pretrained(config.folder, num_hidden_layers=1)",
        ),
        ("tensors are unexpected in the checkpoint and would be dropped", "model.layers.1."),
        "placement_mismatch",
        "F15",
        tuple(
            f"model.layers.1.{name}.weight"
            for name in (
                "input_layernorm",
                "mlp.down_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "post_attention_layernorm",
                "self_attn.k_proj",
                "self_attn.o_proj",
                "self_attn.q_proj",
                "self_attn.v_proj",
            )
        ),
    ),
    "leaves-a-global": Fault(
        "load",
        load_then("import torch; torch.set_default_dtype(torch.float64)"),
        ("3 loads in a row were overlapped", "torch default dtype is torch.float64", "(F4)"),
        "load_failed",
        "F4",
    ),
    # --- certificate
    "head-on-meta": Fault(
        "certificate",
        load_then('model.lm_head.to("meta")'),
        ("lm_head.weight was left on meta (F1)", "Strategy head-on-meta"),
        "placement_mismatch",
        "F1",
        ("lm_head.weight",),
    ),
    "buffer-on-meta": Fault(
        "certificate",
        load_then("rope = model.model.rotary_emb", "rope.inv_freq = rope.inv_freq.to('meta')"),
        ("model.rotary_emb.inv_freq was left on meta (F2)", "Strategy buffer-on-meta"),
        "placement_mismatch",
        "F2",
        ("model.rotary_emb.inv_freq",),
    ),
    "returns-a-layer": Fault(
        "certificate",
        load_then("model = model.lm_head"),
        ("strategy returns-a-layer: F7 check raised AttributeError: 'Linear' object has no",),
        "placement_mismatch",
        "F7",
    ),
    "breaks-in-the-forward": Fault(
        "certificate",
        load_then(
            "model.model.layers[1].mlp.down_proj.weight.data = model.lm_head.weight.data",
        ),
        ("model.layers.1.mlp.down_proj cannot run: RuntimeError",),
        "placement_mismatch",
        tensors=("model.layers.1.mlp.down_proj",),
    ),
    "release-raises": Fault(
        "certificate",
        load_then('model.lm_head.to("meta")') | RELEASE_RAISES,
        ("lm_head.weight was left on meta (F1)",),
        "placement_mismatch",
        "F1",
        ("lm_head.weight",),
    ),
    # --- validate
    "validate-raises": Fault(
        "validate",
        hook("validate", "raise KeyError('lm')"),
        ("strategy validate-raises: validate raised KeyError: 'lm'", "validate_raises.py:"),
    ),
    "validate-refuses": Fault(
        "validate",
        hook(
            "validate",
            "from service.errors import PlacementMismatch",
            "raise PlacementMismatch('norm is on cpu', tensors=['model.norm.weight'])",
        ),
        ("norm is on cpu",),
        "placement_mismatch",
        tensors=("model.norm.weight",),
    ),
    # --- place_inputs
    "places-raises": Fault(
        "place_inputs",
        hook("place_inputs", "raise OSError(5)"),
        ("strategy places-raises: place_inputs raised OSError: 5",),
    ),
    "places-nothing": Fault(
        "place_inputs",
        hook("place_inputs", "return None"),
        ("strategy places-nothing: place_inputs returned NoneType",),
    ),
    "places-on-meta": Fault(
        "place_inputs",
        hook("place_inputs", "return {name: one.to('meta') for name, one in inputs.items()}"),
        ("strategy places-on-meta: place_inputs put input_ids on meta", "(F7)"),
        "placement_mismatch",
        "F7",
    ),
    "drops-a-key": Fault(
        "place_inputs",
        hook("place_inputs", "return {}"),
        ("strategy drops-a-key: place_inputs returned [] for inputs [",),
    ),
    "places-other-ids": Fault(
        "place_inputs",
        hook("place_inputs", "return {name: one + 1 for name, one in inputs.items()}"),
        ("strategy places-other-ids: place_inputs changed the values of input_ids",),
        "placement_mismatch",
    ),
    # --- the engine starts
    "returns-the-inner-model": Fault(
        "start",
        load_then("model = model.model"),
        ("LlamaModel is not a language model",),
        "load_failed",
    ),
    "fails-at-the-first-token": Fault(
        "start",
        load_then("model.register_forward_pre_hook(only_before_the_engine)")
        | beside(ONLY_BEFORE_THE_ENGINE),
        ("The first token could not be generated: OSError: the kernel is gone",),
        "load_failed",
    ),
    "places-badly-in-the-engine": Fault(
        "start",
        hook("place_inputs", "only_before_the_engine(model, inputs)", "return dict(inputs)")
        | beside(ONLY_BEFORE_THE_ENGINE),
        ("place_inputs raised OSError: the kernel is gone",),
    ),
}
STAGES = (
    "import",
    "select",
    "options",
    "plan",
    "load",
    "certificate",
    "validate",
    "place_inputs",
    "start",
)
