"""The plan of strategy cpu: packed copies and 8- or 4-bit weights, to the byte."""

import dataclasses
from typing import Any

from service.config.schema import ModelConfig
from service.errors import DoesNotFit
from service.errors import PlacementMismatch
from service.placement import planning
from service.placement.hardware import Hardware
from service.placement.plan import Placement
from service.placement.sizes import in_words


def plan(config: ModelConfig, hardware: Hardware, *, pack: bool) -> Placement:
    """The whole model in RAM. pack: with packed copies of its linear layers, if they fit.

    int8 and int4 are our own formats here and need no bitsandbytes. Raises DoesNotFit, also when
    the weights do not fit before they are quantised.
    """
    from service.placement import cpu_linears

    if config.quantize in cpu_linears.FORMATS:
        return _quantised(config, hardware)
    if pack and config.quantize == "none":
        try:
            return _packed(config, hardware)
        except DoesNotFit:
            made = planning.on_one_device(config, hardware, "cpu")
            note = "No packed copies of the linear layers: they do not fit. It runs slower."
            return dataclasses.replace(made, notes=(*made.notes, note))
    return planning.on_one_device(config, hardware, "cpu")


def carry_out(model: Any, config: ModelConfig, placement: Placement) -> None:
    """Pack or quantise a model that was just loaded. Changes it in place; returns nothing."""
    from service.placement import cpu_linears

    if config.quantize in cpu_linears.FORMATS:
        cpu_linears.quantise(model, config.quantize)
    elif placement.packed:
        cpu_linears.pack(model)


def packed_as_planned(model: Any, placement: Placement) -> None:
    """Raise PlacementMismatch unless as many layers are packed as were planned, and a sample of
    them computes what its weights say.
    """
    from service.placement import cpu_linears
    from service.placement.tensors import listed

    found = sum(isinstance(module, cpu_linears.PackedLinear) for module in model.modules())
    if found != placement.packed:
        raise PlacementMismatch(
            f"{found} linear layers have a packed copy, {placement.packed} were planned",
            hint="something rebuilt the model's layers after the load; set options: {pack: off}",
        )
    names = cpu_linears.differing(model)
    if names:
        raise PlacementMismatch(
            f"the packed copy of {listed(names)} does not compute what the weight does (F16)",
            hint="something wrote into the model after the load; set options: {pack: off}",
            failure_class="F16",
            tensors=[f"{name}.weight" for name in names],
        )


def _packed(config: ModelConfig, hardware: Hardware) -> Placement:
    from service.placement import cpu_linears
    from service.placement.tensors import nbytes

    model = _skeleton(config, hardware)
    more = {name: nbytes(linear.weight) for name, linear in cpu_linears.packable(model)}
    made = planning.on_one_device(
        config, hardware, "cpu", lambda footprint: _with(footprint, more, footprint.quantized)
    )
    if not more:
        return made
    note = f"{in_words(sum(more.values()))} of the weights are packed copies of linear layers."
    return dataclasses.replace(made, packed=len(more), notes=(*made.notes, note))


def _quantised(config: ModelConfig, hardware: Hardware) -> Placement:
    from service.placement import cpu_linears
    from service.placement.tensors import nbytes

    plain = config.model_copy(update={"quantize": "none"})
    model = _skeleton(plain, hardware)
    owners: dict[int, int] = {}
    for _, tensor in model.named_parameters(remove_duplicate=False):
        owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    more = {}
    for name, linear in cpu_linears.quantisable(model):
        kind = cpu_linears.format_of(name, model, config.quantize)
        shared = owners[id(linear.weight)] > 1
        more[name] = cpu_linears.quantised_bytes(linear, kind)
        more[name] -= 0 if shared else nbytes(linear.weight)
    before = 0

    def change(footprint: Any) -> Any:
        nonlocal before
        before = footprint.weights
        return _with(footprint, more, len(more))

    made = planning.on_one_device(plain, hardware, "cpu", change)
    room = planning.budgets(config, hardware, ["cpu"])["cpu"]
    if before > room:
        raise DoesNotFit(
            f"{config.model_id} is quantised after it was loaded, and needs {in_words(before)} "
            f"until then; cpu can take {in_words(room)} (F20)",
            hint="free some RAM for the load, or use quantize: nf4",
            failure_class="F20",
        )
    note = f"The load takes {in_words(before)}, before the weights are {config.quantize}."
    return dataclasses.replace(made, notes=(*made.notes, note))


def _skeleton(config: ModelConfig, hardware: Hardware) -> Any:
    from service.placement import footprint

    hf_config = footprint.read_config(config)
    bfloat16 = hardware.cpu.bfloat16
    dtype = footprint.resolve_dtype(config, hf_config, on_cpu=True, native_bfloat16=bfloat16)
    return footprint.skeleton(config, hf_config, dtype)


def _with(footprint: Any, more: dict[str, int], quantized: int) -> Any:
    """The footprint with so many bytes more (or less) in the units that hold these modules."""
    units = []
    for unit in footprint.units:
        inside = (n for n in more if n == unit.name or n.startswith(f"{unit.name}."))
        units.append(dataclasses.replace(unit, weights=unit.weights + sum(more[n] for n in inside)))
    return dataclasses.replace(footprint, units=tuple(units), quantized=quantized)
