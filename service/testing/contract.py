"""The contract of a strategy as checks, one function each.

A check looks at a Case, returns in a few words what it found, and raises a ServiceError that says
what is wrong and where it is written, or NotRun if it cannot be run here. pytest runs them through
`StrategyContract`, `moorage plugins check` through `service.testing.examining`.
"""

import contextlib
import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from service.errors import DoesNotFit
from service.errors import PlacementMismatch
from service.errors import PlacementUnavailable
from service.errors import PluginError
from service.errors import ServiceError
from service.placement import certificate
from service.placement import checks
from service.placement import guard
from service.placement import loading
from service.placement import traced
from service.placement.inputs import input_device
from service.placement.inputs import place
from service.placement.plan import Placement
from service.placement.tensors import listed
from service.placement.tensors import offload_owners
from service.testing import faults
from service.testing import machines
from service.testing import reference
from service.testing import watching
from service.testing.case import Case
from service.testing.case import NotRun
from service.testing.simulated_check import works_on_simulated_accelerators

# largest difference of a logit, as a share of the largest logit, where nothing is rounded
EXACT = 1e-4
# else the least cosine similarity of the logits of a token, by what rounds them
ALIKE = {
    "bfloat16": 0.99,
    "float16": 0.99,
    "Linear8bitLt": 0.98,
    "Int8Linear": 0.98,
    "Int8Tensor": 0.98,  # torchao's
    "Linear4bit": 0.9,
    "Int4Linear": 0.9,
}
Check = Callable[[Case], str]


def imports_lightly(case: Case) -> str:
    """The module is imported without torch, transformers, accelerate, bitsandbytes or a GPU."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from service.testing import light_import; sys.exit(light_import.main(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path), case.strategy.source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise PluginError(
            f"the import fails: {done.stdout or done.stderr[-300:]}",
            hint="import torch and the like inside the hooks: listing strategies is then instant",
        )
    return case.strategy.source


def plan_reads_no_weights(case: Case) -> str:
    """`plan` needs config.json only, and loads nothing where there is more."""
    with watching.watched(case.is_author) as watch:
        _, whole = case.planned_somewhere(case.config)
    if watch.loads:
        look = watch.loads[0]
        raise PluginError(
            f"plan calls {look.what} ({look.where})",
            hint="service.placement.planning knows every size without reading weights",
        )
    folder = case.workspace / "config-only"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(case.folder / "config.json", folder / "config.json")
    try:
        case.planned_somewhere(case.configured(folder))
    except ServiceError as error:
        raise _broken(
            case,
            "plan",
            f"plan fails where there is config.json only: {error.message}",
            hint="service.placement.planning knows every size without reading weights",
        ) from None
    return f"{', '.join(whole.devices)}: {len(whole.units)} parts"


def plan_depends_on_its_arguments(case: Case) -> str:
    """`plan` gives the same result twice, in another environment, folder and at another time."""
    hardware, first = case.planned_somewhere(case.config)
    with watching.watched(case.is_author) as watch:
        second = case.strategy.plan(case.config, hardware)
    if watch.looks:
        looked = dict.fromkeys(f"{look.what} ({look.where})" for look in watch.looks)
        raise PluginError(
            f"plan looks at {listed(list(looked))}; it may look at config and hardware only",
            hint="make it an option (class Options), or take it from hardware",
        )
    with watching.elsewhere(case.workspace):
        third = case.strategy.plan(case.config, hardware)
    for when, other in (("the second time", second), ("in another environment", third)):
        different = [
            item.name
            for item in fields(Placement)
            if watching.by_value(getattr(first, item.name))
            != watching.by_value(getattr(other, item.name))
        ]
        if different:
            text = f"plan says something else {when}: {listed(different)} differ"
            raise _broken(case, "plan", text)
    return "three times the same"


def refuses_an_empty_machine(case: Case) -> str:
    """On a machine without memory or GPU `plan` raises what the operator understands."""
    try:
        placement = case.strategy.plan(case.config, machines.empty())
    except (DoesNotFit, PlacementUnavailable) as error:
        if error.hint is None:
            text = f"plan refuses a machine without memory, but without a hint: {error.message}"
            raise _broken(case, "plan", text, hint="say what would fit: hint=...") from None
        return f"{type(error).__name__}: {error.message}"
    except ServiceError as error:
        raise _broken(
            case,
            "plan",
            f"plan crashes on a machine with 64 KiB of memory: {error.message}",
            hint="raise DoesNotFit or PlacementUnavailable, with a hint",
        ) from None
    raise _broken(
        case,
        "plan",
        f"plan puts the model on {', '.join(placement.devices) or 'nothing'} of a machine with "
        "64 KiB of memory and no GPU",
        hint="raise DoesNotFit: service.placement.planning does",
    )


def load_restores_globals(case: Case) -> str:
    """`load` leaves nothing swapped that torch and transformers need for the next load."""
    placement = case.placement
    case.drop()
    model = None
    with guard.LOAD_LOCK, loading.observed(lambda share: None):
        guard.heal()
        try:
            model = case.strategy.load(case.config, placement)
        except Exception:  # what it raises is the matter of the check of load
            failed = True
        else:
            failed = False
        names = guard.heal()
    if model is not None:
        with contextlib.suppress(ServiceError):  # the check of release reports it
            case.strategy.release(model)
    if names:
        case.unfit = "it leaves globals swapped out: see load-restores-globals"
        raise _broken(
            case,
            "load",
            f"load leaves {listed(names)} swapped out (F4)",
            hint="restore it in a finally: every later load in the process would be broken",
        )
    if failed:
        raise NotRun("there is no model: see load-returns-a-model")
    return f"{guard.watched_count()} functions are what they were"


def load_returns_a_model(case: Case) -> str:
    """`load` carries out the plan: a model comes back, with the tensors of the checkpoint."""
    failure = case.failure()
    if failure is not None:
        raise _broken(case, "load", failure.message, hint=failure.hint)
    return f"{type(case.loaded().model).__name__} in {case.loaded().seconds:.1f} s"


def load_leaves_nothing_on_meta(case: Case) -> str:
    """Every tensor has its values, or an offload hook that has them."""
    loaded = case.loaded()
    owners = offload_owners(loaded.model)
    try:
        parameters = checks.parameters_exist(loaded, owners)
        buffers = checks.buffers_exist(loaded, owners)
    except PlacementMismatch as error:
        raise _broken(
            case,
            "load",
            error.message,
            hint="load with device_map=placement.load_kwargs['device_map']; accelerate then "
            "attaches a hook to whatever is offloaded",
        ) from None
    return f"{parameters} parameters, {buffers} buffers"


def declares_offload(case: Case) -> str:
    """Tensors are on the planned devices only, and `placement.allows` says if they rest away."""
    loaded = _whole(case)
    owners = offload_owners(loaded.model)
    try:
        checks.offload_intended(loaded, owners)
    except PlacementMismatch as error:
        raise _broken(
            case,
            "plan",
            error.message,
            hint='let plan say so: allows=frozenset({"offload"}); planning.mapped does',
        ) from None
    return f"{len(owners)} tensors, and plan says so" if owners else "nothing is offloaded"


def validate_accepts_the_model(case: Case) -> str:
    """`validate` accepts what `load` returned."""
    loaded = _whole(case)
    try:
        case.strategy.validate(loaded.model, loaded.placement)
    except ServiceError as error:
        text = f"validate refuses what load returned: {error.message}"
        raise _broken(case, "validate", text) from None
    return "accepted"


def validate_rejects_faults(case: Case) -> str:
    """`validate` refuses each planted fault with PlacementMismatch, naming the tensor."""
    loaded = _whole(case)
    try:
        case.strategy.validate(loaded.model, loaded.placement)
    except ServiceError:
        raise NotRun("it refuses the sound model too") from None
    found = []
    try:
        for fault in faults.faults(loaded.model):
            with fault.planted():
                _refused(case, loaded, fault)
            found.append(fault.what)
    finally:
        case.drop()  # hooks that were removed do not come back
    return f"refused: {'; '.join(found)}"


def _refused(case: Case, loaded: loading.Loaded, fault: faults.Fault) -> None:
    try:
        case.strategy.validate(loaded.model, loaded.placement)
    except PlacementMismatch as error:
        if fault.tensor is None or fault.tensor in (*error.tensors, *error.message.split()):
            return
        text = f"{fault.what}, and validate does not name it: {error.message}"
    except ServiceError as error:
        text = f"{fault.what}, and validate raises no PlacementMismatch: {error.message}"
    else:
        text = f"validate accepts a model of which {fault.what}"
    hint = "call service.placement.checks.placed_as_planned(model, placement)"
    raise _broken(case, "validate", text, hint=hint)


def place_inputs_keeps_inputs(case: Case) -> str:
    """`place_inputs` changes nothing but the device, and leaves its argument alone."""
    loaded = case.loaded()
    sample = reference.sample()
    copies = {name: tensor.clone() for name, tensor in sample.items()}
    handed = dict(sample)
    hint = "return service.placement.inputs.to_input_device(model, inputs)"
    try:
        placed = place(case.strategy.place_inputs, loaded.model, handed, "place_inputs")
    except ServiceError as error:
        raise _broken(case, "place_inputs", error.message.rstrip("."), hint=hint) from None
    expected = input_device(loaded.model, loaded.placement.main_device)
    for name, before in copies.items():
        if handed.get(name) is not sample[name] or sample[name].tolist() != before.tolist():
            text = f"place_inputs changed its argument: {name}"
        elif placed[name].device != expected:
            text = f"place_inputs put {name} on {placed[name].device}; inputs belong on {expected}"
        elif placed[name].tolist() != before.tolist():
            text = f"place_inputs changed the values of {name}"
        else:
            continue
        raise _broken(case, "place_inputs", text, hint=hint)
    if placed is handed:
        raise _broken(case, "place_inputs", "place_inputs returned its argument", hint=hint)
    return f"{len(placed)} tensors on {expected}"


def forward_equals_reference(case: Case) -> str:
    """The model answers like plain transformers on the CPU in float32, as near as its format."""
    loaded = _whole(case)
    ids = reference.sample()["input_ids"]
    try:
        given = {"input_ids": ids}
        if loaded.model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids
        placed = place(case.strategy.place_inputs, loaded.model, given)
        sound = placed["input_ids"].device == input_device(loaded.model, case.placement.main_device)
    except ServiceError:
        sound = False
    if not sound:
        raise NotRun("place_inputs fails: see place-inputs-keeps-inputs")
    try:
        with guard.LOAD_LOCK:
            logits, _ = traced.forward(loaded.model, placed)
    except PlacementMismatch as error:
        raise _broken(case, "load", f"the forward fails: {error.message}") from None
    expected = reference.logits(case.folder, ids)
    # by way of Python's numbers, which is from any device
    found = torch.tensor(logits.tolist())
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    kinds |= {type(weight).__name__ for weight in loaded.model.parameters()}
    formats = [*kinds, str(logits.dtype).removeprefix("torch.")]
    least = min((ALIKE[kind] for kind in formats if kind in ALIKE), default=None)
    if least is None:
        off = ((found - expected).abs().max() / expected.abs().max()).item()
        if not off <= EXACT:
            text = f"logits are {off:.1e} of the largest one away from transformers' own"
            raise _broken(case, "load", f"{text}; {EXACT:.0e} is allowed")
        return f"at most {off:.1e} of the largest logit away; {EXACT:.0e} is allowed"
    alike = torch.nn.functional.cosine_similarity(found, expected, dim=-1).min().item()
    if not alike >= least:
        text = f"logits are {alike:.3f} alike (cosine) to transformers' own in float32"
        raise _broken(case, "load", f"{text}; {least} is needed")
    return f"{alike:.3f} alike (cosine); {least} is needed"


def is_certified(case: Case) -> str:
    """The core's own certificate is valid."""
    issued = certificate.certify(case.loaded())
    failure = issued.failure()
    if failure is not None:
        raise PluginError(said(case, f"no certificate: {failure.message}"), hint=failure.hint)
    return f"{len(issued.checks)} checks"


def release_lets_the_model_die(case: Case) -> str:
    """After `release` nobody holds the model, so its memory is free for the next attempt."""
    case.loaded()
    case.drop()
    loaded = case.load()
    alive = weakref.ref(loaded.model)
    case.strategy.release(loaded.model)
    del loaded
    gc.collect()
    model = alive()
    if model is None:
        return "gone"
    holder = case.holder(model)
    where = f"{holder} holds it" if holder else case.at("release")
    raise PluginError(
        f"the model is alive after release ({where})",
        hint="keep no reference to it, or drop it in release",
    )


CHECKS: tuple[tuple[str, Check], ...] = tuple(
    (check.__name__.replace("_", "-"), check)
    for check in (
        imports_lightly,
        plan_reads_no_weights,
        plan_depends_on_its_arguments,
        refuses_an_empty_machine,
        works_on_simulated_accelerators,
        load_restores_globals,
        load_returns_a_model,
        load_leaves_nothing_on_meta,
        declares_offload,
        validate_accepts_the_model,
        place_inputs_keeps_inputs,
        forward_equals_reference,
        is_certified,
        validate_rejects_faults,
        release_lets_the_model_die,
    )
)


def _whole(case: Case) -> loading.Loaded:
    """The loaded model, all of whose tensors are somewhere. Raises NotRun if they are not."""
    loaded = case.loaded()
    owners = offload_owners(loaded.model)
    try:
        checks.parameters_exist(loaded, owners)
        checks.buffers_exist(loaded, owners)
    except PlacementMismatch:
        raise NotRun("there are tensors on meta: see load-leaves-nothing-on-meta") from None
    return loaded


def _broken(case: Case, hook: str, text: str, *, hint: str | None = None) -> PluginError:
    """The error of a check, with the hook's place if no line of the author's is named yet."""
    text = said(case, text)
    named = Path(case.strategy.source).name + ":"
    return PluginError(text if named in text else f"{text} ({case.at(hook)})", hint=hint)


def said(case: Case, text: str) -> str:
    """A message without the strategy's name and file, which head the report already."""
    name, source = case.strategy.name, case.strategy.source
    return text.replace(f"strategy {name}: ", "").replace(f" ({source})", "")
