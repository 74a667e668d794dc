"""The checks of the certificate that look at values: buffers (F3) and weights (F16).

A tensor that is on its device, with its shape and dtype, may still hold what was in memory.
"""

import copy
import logging
import zlib
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers import initialization

from service.errors import PlacementMismatch
from service.models import folder as model_folder
from service.models.headers import TensorInfo
from service.placement import guard
from service.placement import stored
from service.placement.loading import Loaded
from service.placement.tensors import Owner
from service.placement.tensors import listed
from service.placement.tensors import parts_of

log = logging.getLogger("moorage.certificate")

# of a vector that many values are compared, of a matrix one row
VECTOR = 65_536
FLOATS = {"BF16", "F16", "F32", "F64"}
# a checkpoint is rounded once to what is computed with, and perhaps widened again afterwards
ROUNDED = (None, torch.bfloat16, torch.float16)


def buffers_computed(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F3: buffers that are in no checkpoint hold what the model's class computes.

    Compared within the precision of their dtypes. One whose class computes something else every
    time cannot be judged and passes, and so does one the strategy added.
    """
    found = {
        name: buffer
        for name, buffer in _computed_buffers(loaded.model)
        if name not in loaded.placement.allows
    }
    expected = _built(loaded, initialised=False) if found else None
    if expected is None:
        return 0
    found = {name: b for name, b in found.items() if name in expected}
    wrong = {
        name: value
        for name, buffer in found.items()
        if (value := _value(buffer, owners.get(name))) is not None
        and not _same(value, expected[name])
    }
    if wrong:
        _refuse_buffers(loaded, wrong)
    return len(found)


def _computed_buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key in module._non_persistent_buffers_set:
                yield f"{prefix}.{key}" if prefix else key, buffer


def _value(buffer: torch.Tensor, owner: Owner | None) -> torch.Tensor | None:
    """The buffer's values on CPU, or None where F2 has found none."""
    if buffer.device.type != "meta":
        return _at_home(buffer)
    found = stored.find(owner) if owner is not None else None
    return None if found is None else found.read(tuple(slice(None) for _ in found.shape))


def _refuse_buffers(loaded: Loaded, wrong: Mapping[str, torch.Tensor]) -> None:
    """Build the class again, twice and in full: what differs then too is wrong.

    The second time on the model's own device, whose arithmetic may differ. Where both differ from
    each other, the values are random or the device's, and nobody can say what is right.
    """
    device = next((b.device for b in loaded.model.buffers() if b.device.type != "meta"), None)
    first, second = _built(loaded), _built(loaded, device=device)
    if first is None or second is None:
        return
    names = [
        name
        for name, value in wrong.items()
        if _same(first[name], second[name])
        and not _same(value, second[name])
        and not _stretched(loaded.model, name, value)
    ]
    if not names:
        return
    value, right = wrong[names[0]].flatten(), second[names[0]].flatten()
    facts = f"it begins with {_some(value)}, computed are {_some(right)}"
    if wrong[names[0]].shape != second[names[0]].shape:
        facts = f"{list(wrong[names[0]].shape)}, computed are {list(second[names[0]].shape)}"
    differ = "differs" if len(names) == 1 else "differ"
    raise PlacementMismatch(
        f"{listed(names)} {differ} from what {type(loaded.model).__name__} computes (F3): {facts}",
        hint="no checkpoint has such a buffer: the model's _init_weights must compute it again "
        "after a load; if it is meant, the strategy names it in Placement.allows",
        failure_class="F3",
        tensors=names,
    )


def _stretched(model: Any, name: str, value: torch.Tensor) -> bool:
    """Rotary frequencies of a kind that transformers changes with the longest prompt seen."""
    prefix, _, key = name.rpartition(".")
    kinds = getattr(model.get_submodule(prefix), "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
    grows = any(kind in ("dynamic", "longrope") for kind in kinds)
    frequencies = key.endswith("inv_freq") and "original" not in key
    return grows and frequencies and bool((value.isfinite() & (value > 0)).all())


def _some(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:3].tolist())


def _built(
    loaded: Loaded, *, initialised: bool = True, device: torch.device | None = None
) -> dict[str, torch.Tensor] | None:
    """The buffers that the model's class computes, on CPU; None if it cannot be built so.

    Parameters go to meta as they are made. Without `initialised` a fifth of the time, but buffers
    that the class fills in `_init_weights` are not filled.
    """
    model = loaded.model
    if not isinstance(model, PreTrainedModel):
        return None
    config = copy.deepcopy(model.config)
    still = guard.stillness.keep()
    with guard.LOAD_LOCK, still, _defaults(model.dtype, device), init_empty_weights():
        try:
            if initialised:
                built = type(model)(config)
            else:
                with initialization.no_init_weights():
                    built = type(model)(config)
        except Exception:  # the class of a plugin's model may ask for anything else, and raise
            log.debug("%s cannot be built from its config", type(model).__name__, exc_info=True)
            return None
    buffers = built.named_buffers(remove_duplicate=False)
    return {name: _at_home(buffer) for name, buffer in buffers if not buffer.is_meta}


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device | None) -> Iterator[None]:
    """The default dtype and device under which `from_pretrained` builds a model. Hold LOAD_LOCK."""
    before = torch.get_default_dtype()
    devices = [device] if device is not None and device.type == "cuda" else []
    if dtype.is_floating_point:
        torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=devices):
            # what is random must come out differently on another device; no GPU's state is touched
            torch.default_generator.manual_seed(0 if device is None else 1)
            if device is None:
                yield
            else:
                with device:
                    yield
    finally:
        torch.set_default_dtype(before)


def _same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal within a few units of the coarser dtype; exactly, where one is not of floats."""
    if value.shape != expected.shape:
        return False
    if not (value.is_floating_point() and expected.is_floating_point()):
        return torch.equal(value, expected.to(dtype=value.dtype))
    precision = max(torch.finfo(value.dtype).eps, torch.finfo(expected.dtype).eps)
    return torch.allclose(
        value.double(), expected.double(), rtol=16 * precision, atol=1e-30, equal_nan=True
    )


def _at_home(tensor: torch.Tensor) -> torch.Tensor:
    """The values on CPU, to be compared there."""
    return tensor.detach().cpu()


# --- weights


def values_are_the_files(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F16: a row of every tensor that the checkpoint stores as it is has the file's values.

    Quantised and converted tensors, GGUF files and tied names have no such row and are skipped. A
    sample: noise in a whole tensor is found, one changed value hardly ever.
    """
    config = loaded.config
    if config.folder is None or config.gguf_file is not None:
        return 0
    headers = model_folder.headers(config.folder)
    files: dict[str, Any] = {}
    sampled = 0
    wrong: list[tuple[str, str]] = []
    for name, tensor, key in _plainly_stored(loaded, headers):
        owner = owners.get(name) if tensor.device.type == "meta" else None
        found = stored.find(owner) if owner is not None else None
        if tensor.device.type == "meta" and (found is None or found.shape != headers[key].shape):
            continue  # nowhere: F1 says so
        index = _row(name, headers[key].shape)
        part = found.read(index) if found is not None else _at_home(tensor[index])
        file = stored.opened(files, config.folder / headers[key].file)
        sampled += 1
        if not _read_from(part, file.get_slice(key)[index]):
            wrong.append((name, headers[key].file))
    if wrong:
        names = [name for name, _ in wrong]
        differ = "differs" if len(names) == 1 else "differ"
        raise PlacementMismatch(
            f"{listed(names)} {differ} from {wrong[0][1]} (F16): "
            f"{len(wrong)} of {sampled} sampled tensors do not hold what was loaded",
            hint="something wrote into the model, or into its file, after the load; if it is "
            "meant, the strategy names the tensors in Placement.allows",
            failure_class="F16",
            tensors=names,
        )
    return sampled


def _plainly_stored(
    loaded: Loaded, headers: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Name, tensor and name in the file of everything that was only cast when it was loaded."""
    model = loaded.model
    aliases = getattr(model, "all_tied_weights_keys", None) or {}
    files = _names_in_file(model, headers)
    prefix = f"{model.base_model_prefix}."
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # a file of a model with its head, or of one without, has the names of that
        key = files.get(name) or files.get(name.removeprefix(prefix)) or files.get(prefix + name)
        if key is None:
            continue
        info = headers[key]
        if (
            name in aliases
            or name in loaded.placement.allows
            or info.shape != tuple(tensor.shape)
            or not tensor.numel()
            or parts_of(tensor)[0] is not tensor
            or (info.dtype in FLOATS) != (tensor.dtype in _TORCH_FLOATS)
        ):
            continue
        yield name, tensor, key


_TORCH_FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}


def _names_in_file(model: Any, headers: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Name in the model -> name in the file, without what transformers computes while it loads.

    It leaves the rules that it used with the model; one with operations computes, others rename.
    """
    found: dict[str, str] = {}
    for key in headers:
        name = key
        for rule in getattr(model, "_weight_conversions", None) or ():
            name, matched = rule.rename_source_key(name)
            if matched is not None and hasattr(rule, "operations"):
                break
        else:
            found[name] = key
    return found


def _row(name: str, shape: tuple[int, ...]) -> stored.Index:
    """The same row of the last dimension every time, another one in every tensor."""
    number = zlib.crc32(name.encode())
    if len(shape) < 2:
        return tuple(slice(0, VECTOR) for _ in shape)
    return (*(slice(number % n, number % n + 1) for n in shape[:-1]), slice(None))


def _read_from(value: torch.Tensor, row: torch.Tensor) -> bool:
    """Whether `value` is the file's row as a load casts it. Both on CPU, of one shape."""
    for between in ROUNDED if value.is_floating_point() else (None,):
        cast = (row if between is None else row.to(dtype=between)).to(dtype=value.dtype)
        same = cast == value
        if value.is_floating_point():
            same |= cast.isnan() & value.isnan()
        if bool(same.all()):
            return True
    return False
