"""The guarded load: one at a time, pristine globals before and after, nothing left of a failed one.

`loading.load` is the only caller of a strategy's `load`, but for the contract kit, which looks at
the globals before they are healed.
"""

import contextlib
import gc
import logging
import operator
import time
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any

import torch
from torch._subclasses import FakeTensor
from transformers import modeling_utils
from transformers.utils import logging as transformers_logging

from service.config.schema import ModelConfig
from service.errors import LoadFailed
from service.errors import PlacementMismatch
from service.errors import ServiceError
from service.placement import finding
from service.placement import guard
from service.placement import heads
from service.placement import split_layers
from service.placement.plan import Placement
from service.placement.tensors import listed
from service.placement.tensors import only_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from service.placement.registry import Strategy

log = logging.getLogger("moorage.load")

Progress = Callable[[float], None]
# an overlapping load of somebody else may poison the repeated load too; then it is not chance
MOST_LOADS = 3
# workspaces that CUDA libraries keep once they have been used
SLACK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class KeyReport:
    """What one `from_pretrained` found out about the checkpoint's keys."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A model that `load` returned, with all that the certificate needs to judge it."""

    model: "PreTrainedModel"
    strategy: "Strategy"
    config: ModelConfig
    placement: Placement
    keys: tuple[KeyReport, ...]
    seconds: float
    notes: tuple[str, ...] = field(default=())


def load(
    strategy: "Strategy", config: ModelConfig, placement: Placement, progress: Progress
) -> Loaded:
    """Run the strategy's `load` under the process-wide lock and return what it loaded.

    A load that another one overlapped is healed, thrown away and repeated (F4). `progress` gets
    0..1. Raises LoadFailed (the strategy raised, or globals stay poisoned), PluginError (no model
    came back), PlacementMismatch F15 (keys of the checkpoint and of the model differ). Whatever is
    raised, the model is gone and its memory free: the exception holds no frame of the load.
    """
    notes: list[str] = []
    started = time.monotonic()
    with guard.LOAD_LOCK:
        names = guard.heal()
        if names:
            notes.append(f"an earlier load had left {listed(names)} swapped out (F4); restored")
        for _ in range(MOST_LOADS):
            with observed(progress) as keys:
                model: PreTrainedModel | None = _call(strategy, config, placement)
            names = guard.heal() or _left_untied(model, keys)
            if not names:
                break
            notes.append(f"another load overlapped: {listed(names)} (F4); restored; reloading")
            log.warning("%s", notes[-1])
            model = None
            collect()
    if model is None:
        raise LoadFailed(
            f"{MOST_LOADS} loads in a row were overlapped by another load in this process; "
            f"{listed(names)} stays swapped out (F4)",
            hint="load models through Moorage only, or in another process",
            failure_class="F4",
        )
    try:
        spare = heads.spare(model)
        check_keys(keys, placement.allows | spare)
    except PlacementMismatch:
        model = None  # the traceback holds this frame
        raise
    model.eval()
    split_layers.join(model, placement.load_kwargs.get("device_map"))
    _lay_out_inputs(model)
    notes += heads.note(keys, spare)
    _wake(model)
    seconds = time.monotonic() - started
    return Loaded(model, strategy, config, placement, tuple(keys), seconds, tuple(notes))


def _wake(model: "PreTrainedModel") -> None:
    """Run a model that is whole on a card once, before it is judged.

    CUDA's libraries and kernels are loaded when they are first called, which takes a second: that
    belongs to the load, not to what proves it. bitsandbytes has called them by now, and its layers
    change when they first run.
    """
    device = only_device(model)
    if device is None or device.type != "cuda" or getattr(model, "is_quantized", False):
        return
    ids = torch.zeros((1, 8), dtype=torch.int64, device=device)
    # what is wrong with it is for the certificate to say
    with guard.LOAD_LOCK, torch.inference_mode(), contextlib.suppress(Exception):
        model(input_ids=ids)
        torch.cuda.synchronize(device)


def _lay_out_inputs(model: "PreTrainedModel") -> None:
    """Give 4-bit linears rows that lie one after the other.

    bitsandbytes 0.50's packed kernel for CPUs reads the transposed input of a single sequence, as
    Mamba's mixer hands it over, as if it were not transposed.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.register_forward_pre_hook(_contiguous)


def _contiguous(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs)


def _left_untied(model: "PreTrainedModel | None", keys: list[KeyReport]) -> list[str]:
    """Tied weights that the checkpoint need not have, reported missing all the same.

    Another load had tying swapped out just while this one tied, and has restored it since.
    """
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    missing = {name for report in keys for name in report.missing}
    return sorted(f"tying of {a}" for a, b in pairs.items() if a in missing and b not in missing)


def _call(strategy: "Strategy", config: ModelConfig, placement: Placement) -> "PreTrainedModel":
    """The hook itself; what it raises becomes words and holds no half-loaded model."""
    try:
        return strategy.load(config, placement)
    except ServiceError as error:
        failure = error.bare()
    except (Exception, SystemExit) as error:  # a strategy's load may raise anything, and leave
        log.debug("strategy %s: load raised", strategy.name, exc_info=True)
        failure = LoadFailed(
            f"strategy {strategy.name}: load raised {finding.describe(error)}",
            hint=_advice(error),
        )
    # a model that raised half-way may have left globals swapped; the next attempt starts clean
    # (F21)
    guard.heal()
    raise failure


def _advice(error: BaseException) -> str | None:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device ran out of memory: lower max_context or max_sequences, or see moorage plan"
        )
    return None


def check_keys(keys: list[KeyReport], allowed: frozenset[str]) -> None:
    """Refuse a checkpoint whose tensors are not the model's, but for those `allowed` by name (F15).

    Raises PlacementMismatch naming them.
    """
    for report in keys:
        for what, found, fact in (
            ("missing", report.missing, "would be random"),
            ("mismatched in shape", report.mismatched, "would be random"),
            ("unexpected", report.unexpected, "would be dropped"),
        ):
            names = sorted(set(found) - allowed)
            if names:
                are = "tensor is" if len(names) == 1 else "tensors are"
                raise PlacementMismatch(
                    f"{len(names)} {are} {what} in the checkpoint and {fact}: "
                    f"{listed(names)} (F15)",
                    hint="the files do not belong to this config.json; fetch the model again",
                    failure_class="F15",
                    tensors=names,
                )


@contextmanager
def observed(progress: Progress) -> Iterator[list[KeyReport]]:
    """Collect the key report and the progress of every `from_pretrained` inside. Hold LOAD_LOCK.

    transformers reports key mismatches as a table in the log and goes on. Every load ends in
    `log_state_dict_report`, whoever called it and with whatever arguments, so that is where we
    look.
    """
    reports: list[KeyReport] = []
    original = modeling_utils.log_state_dict_report
    build_under = modeling_utils.local_torch_dtype

    @contextmanager
    def build_in_stillness(*args: Any) -> Iterator[None]:
        """A model that serves makes no step while the new one is built: see `guard`."""
        with guard.stillness.keep(), build_under(*args):
            yield

    def record(*args: Any, **kwargs: Any) -> None:
        info = kwargs["loading_info"] if "loading_info" in kwargs else args[3]
        reports.append(
            KeyReport(
                tuple(info.missing_keys),
                tuple(info.unexpected_keys),
                tuple(
                    str(key[0] if isinstance(key, tuple) else key) for key in info.mismatched_keys
                ),
            )
        )
        if info.error_msgs or info.conversion_errors:
            original(*args, **kwargs)

    # it warns once per layer and step that it casts, and about kernels it does without
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # it warns of every offload; the certificate says whether it was meant
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    hook = transformers_logging.set_tqdm_hook(
        lambda factory, args, kwargs: _Bar(progress, args, kwargs)
    )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    modeling_utils.log_state_dict_report = record
    modeling_utils.local_torch_dtype = build_in_stillness
    try:
        yield reports
    finally:
        modeling_utils.log_state_dict_report = original
        modeling_utils.local_torch_dtype = build_under
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(hook)


class _Bar:
    """What transformers believes to be a tqdm bar; reports the done share of `total`."""

    def __init__(self, progress: Progress, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._items: Any = args[0] if args else kwargs.get("iterable")
        total = kwargs.get("total") or operator.length_hint(self._items or ())
        self._total = total
        self._done = 0
        self._progress = progress

    def update(self, n: int = 1) -> None:
        self._done += n
        if self._total:
            self._progress(min(1.0, self._done / self._total))

    def __iter__(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self.update()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None  # set_description, refresh, close: nothing to draw


def collect() -> None:
    """Free what is unreachable, on the host and in the accelerator's caches."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated_bytes() -> dict[str, int]:
    """Bytes in use per device: by torch's allocator on accelerators, of live tensors in RAM."""
    found = {"cpu": _ram_bytes()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found[f"cuda:{index}"] = torch.cuda.memory_allocated(index)
    return found


def _ram_bytes() -> int:
    """Bytes of every tensor in RAM that Python can reach; each storage counts once."""
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        # by type: `isinstance` asks the thing itself, and a lazy proxy would begin to import
        if not issubclass(type(thing), torch.Tensor) or issubclass(type(thing), FakeTensor):
            continue  # fake ones are what torch.compile's tracing leaves behind: no values
        try:
            if thing.device.type == "cpu":
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):  # only wraps others, or is not in RAM at all
            continue
    return sum(sizes.values())


def reclaim(reference: "weakref.ref[Any] | None", before: dict[str, int]) -> None:
    """Give back the memory of an attempt that failed, and prove it (F21).

    reference: to the model, or None if none came back; nobody may hold it any more.
    before: `allocated_bytes()` from before the attempt.
    Raises LoadFailed when the model is still alive or a device holds more than SLACK_BYTES above
    `before`: the next attempt would not start clean.
    """
    collect()
    if reference is not None and reference() is not None:
        raise LoadFailed(
            "the model of a failed attempt is still referenced; its memory cannot be freed (F21)",
            hint="the strategy keeps it somewhere: drop it in `release`",
            failure_class="F21",
        )
    now = allocated_bytes()
    for device, size in before.items():
        more = now.get(device, 0) - size
        if more > SLACK_BYTES:
            raise LoadFailed(
                f"{device} still holds {more / 2**20:.0f} MiB of a failed attempt (F21)",
                hint="the strategy allocates outside the model: free it in `release`",
                failure_class="F21",
            )
