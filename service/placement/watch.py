"""Notice a model that changed while it serves: moved, cast, hooks lost, NaN (F16, F17, F18).

A fingerprint is taken when the engine has generated its first tokens, because int8 and 4-bit layers
take their final shape in their first forward, and compared later. A comparison reads no weights but
a few numbers of some tensors, which takes a few milliseconds.

Offload hooks move weights in and out during a step, so a look beside the engine would see them half
way. There are two answers to that, and both are here. `Watch.look` is called between two steps, on
the engine thread, where nothing moves; and what an offload hook owns is compared by shape and
number format only, because a step that raised may leave it on its execution device.
Buffers are compared by device and format: models with dynamic RoPE make theirs anew in a forward.
"""

import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from typing import Any
from typing import NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.hooks import SequentialHook
from torch import nn

from service.errors import PlacementDrifted
from service.placement.tensors import listed
from service.placement.tensors import offload_owners
from service.placement.tensors import parts_of
from service.placement.tensors import stored_on

# how many tensors one look reads numbers of, and how many numbers; the next look reads on
TENSORS_A_LOOK = 64
NUMBERS_A_TENSOR = 32
# a probe looks at most so often, and never waits longer than this for a step to end
PROBE_EVERY_S = 1.0
PROBE_WAIT_S = 0.25
MOST_FINDINGS = 50

_CHECKABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_QUANTIZED = ("Linear4bit", "Linear8bitLt")


class Seen(NamedTuple):
    """What is compared of one tensor. address: of its storage, 0 where it has none."""

    device: str
    dtype: str
    shape: tuple[int, ...]
    address: int


@dataclass(frozen=True)
class HookSeen:
    """One of accelerate's hooks. The reference is weak: a hook keeps offloaded weights alive."""

    hook: "weakref.ref[Any]"
    words: str


@dataclass(frozen=True)
class Change:
    """One difference: F16 not a number, F17 a hook, F18 a tensor moved, cast or replaced."""

    failure_class: str
    name: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.name} was {self.was}, is {self.now}"

    def as_dict(self) -> dict[str, str]:
        return {
            "class": self.failure_class,
            "name": self.name,
            "was": self.was,
            "now": self.now,
        }


@dataclass(frozen=True)
class Fingerprint:
    """Where and what everything was.

    hooks: by module. buffers, moving: names of tensors. moving: a hook puts them elsewhere during
    a step. settling: a quantised layer takes its final shape in its first forward, which an expert
    may have late; its stage by module, see `_stage`.
    """

    tensors: dict[str, Seen]
    hooks: Mapping[str, tuple[HookSeen, ...]]
    buffers: frozenset[str]
    moving: frozenset[str]
    settling: dict[str, Any]


def fingerprint(model: nn.Module) -> Fingerprint:
    """The model as it is now. Between two steps only, and after the first."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    moving = set(offload_owners(model))
    hooks: dict[str, tuple[HookSeen, ...]] = {}
    settling: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        found = _hooks(module)
        if found:
            hooks[prefix] = tuple(HookSeen(weakref.ref(hook), _words(hook)) for hook in found)
        if any(not isinstance(hook, AlignDevicesHook) for hook in found):
            # a hook of a kind we do not know, such as CpuOffload: it may move all that is below
            inside = f"{prefix}." if prefix else ""
            moving |= {f"{inside}{name}" for name, _ in module.named_parameters()}
            moving |= {f"{inside}{name}" for name, _ in module.named_buffers()}
        if type(module).__name__ in _QUANTIZED:
            settling[prefix] = _stage(module)
    tensors = {name: _seen(tensor) for name, tensor, _ in _walk(model)}
    return Fingerprint(tensors, hooks, frozenset(buffers), frozenset(moving), settling)


def compare(before: Fingerprint, model: nn.Module) -> list[Change]:
    """What is no longer as it was. Between two steps only; reads no numbers.

    A quantised layer that has had its first forward since is recorded anew in `before`.
    """
    changes: list[Change] = []
    modules = dict(model.named_modules())
    for prefix, hooks in before.hooks.items():
        changes += _hook_changes(prefix, hooks, modules.get(prefix))
    settled = {
        prefix
        for prefix, stage in before.settling.items()
        if prefix in modules and _stage(modules[prefix]) != stage
    }
    found: set[str] = set()
    for name, tensor, buffer in _walk(model):
        found.add(name)
        was, now = before.tensors.get(name), _seen(tensor)
        if was is None:
            if not buffer:  # a buffer may be a cache that a forward made
                changes.append(Change("F18", name, "not there", f"{now.dtype} on {now.device}"))
        elif was != now:
            prefix, _, key = name.rpartition(".")
            if prefix in before.settling and (prefix in settled or key == "bias"):
                # bitsandbytes packs the weight and casts the bias; neither moves
                was = now._replace(device=was.device)
                before.tensors[name] = was
            changes += _tensor_changes(name, was, now, before)
    for prefix in settled:
        before.settling[prefix] = _stage(modules[prefix])
    for name in before.tensors.keys() - found:
        was = before.tensors[name]
        changes.append(Change("F18", name, f"{was.dtype} on {was.device}", "gone"))
    return changes


def not_finite(
    model: nn.Module, before: Fingerprint, turn: int, most: int | None = TENSORS_A_LOOK
) -> list[Change]:
    """Parameters with NaN or infinity among a few of their numbers. Between two steps only.

    turn: of the look; `most` tensors are read, the next turn reads the next ones, and other rows.
    None reads all. What an offload hook keeps in RAM is read there, what is on disk is not.
    """
    names = [name for name in before.tensors if name not in before.buffers]
    if most is not None and most < len(names):
        first = turn * most % len(names)
        names = (names + names)[first : first + most]
    wanted = set(names)
    # of a weight that is made of others, those with fractions: the scales
    tensors = {
        name: next((part for part in parts_of(tensor) if part.dtype in _CHECKABLE), tensor)
        for name, tensor, _ in _walk(model)
        if name in wanted
    }
    tensors |= _resting_in_ram(model, wanted)
    groups: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.dtype in _CHECKABLE and not tensor.is_meta and tensor.numel():
                group = groups.setdefault((tensor.device, tensor.dtype), {})
                group[name] = _some_numbers(tensor, turn)
        bad = [
            name
            for group in groups.values()
            if not torch.isfinite(torch.cat(list(group.values()))).all()  # one wait per device
            for name, numbers in group.items()
            if not torch.isfinite(numbers).all()
        ]
    return [Change("F16", name, "finite numbers", "NaN or infinite") for name in sorted(bad)]


class Watch:
    """The watch over one serving model. It holds the model weakly.

    look: engine thread, between steps. The rest: any thread.
    """

    def __init__(self, model: nn.Module, interval_s: float) -> None:
        """Takes the fingerprint: call it when the engine has warmed up and does nothing.

        interval_s: seconds between two looks of the timer that `patrol` starts.
        """
        self.checks = 0
        self.checked_at: str | None = None
        self.changes: tuple[Change, ...] = ()
        self._found_at: str | None = None
        self._good_at = _now()
        self._interval_s = interval_s
        self._seconds = 0.0
        self._model = weakref.ref(model)
        self._before = fingerprint(model)
        self._ask: Callable[[float], object] = lambda timeout_s: None
        self._closed = threading.Event()
        self._probing = threading.Lock()
        self._probed_at = -PROBE_EVERY_S

    def look(self, thorough: bool) -> PlacementDrifted | None:
        """Compare now; return what to tell everybody if something changed. Engine thread only.

        thorough: read numbers of all tensors instead of the next few.
        """
        model = self._model()
        if model is None or self.changes:
            return self.error()
        began = time.perf_counter()
        changes = compare(self._before, model)
        moved = {change.name for change in changes}
        values = not_finite(model, self._before, self.checks, None if thorough else TENSORS_A_LOOK)
        changes += [change for change in values if change.name not in moved]
        self._seconds = time.perf_counter() - began
        self.checks += 1
        self.checked_at = _now()
        if changes:
            self._found_at = self.checked_at
            self.changes = tuple(changes)
        else:
            self._good_at = self.checked_at
        return self.error()

    def error(self) -> PlacementDrifted | None:
        """A new error that says what changed and since when; None if nothing did."""
        changes = self.changes
        if not changes:
            return None
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        kind = changes[0].failure_class
        return PlacementDrifted(
            f"the model changed while serving ({kind}): {changes[0]}{more}; "
            f"as it should be at {self._good_at}, found at {self._found_at}",
            hint="something in this process changes the model: a strategy, or a library it calls; "
            f"see GET /placement for {listed([change.name for change in changes])}",
            failure_class=kind,
            tensors=[change.name for change in changes[:MOST_FINDINGS]],
        )

    def patrol(self, ask: Callable[[float], object]) -> None:
        """Look every `interval_s`. ask: has the engine call `look`, waiting at most its argument in
        seconds.
        """
        self._ask = ask
        threading.Thread(target=self._patrol, name="watch", daemon=True).start()

    def probe(self) -> None:
        """Look now, unless a probe has within PROBE_EVERY_S. Waits at most PROBE_WAIT_S: while a
        long step runs, the look before it counts.
        """
        with self._probing:
            now = time.monotonic()
            if now - self._probed_at < PROBE_EVERY_S:
                return
            self._probed_at = now
        self._ask(PROBE_WAIT_S)

    def close(self) -> None:
        """End the timer."""
        self._closed.set()

    def as_dict(self) -> dict[str, Any]:
        """The `watch` object of GET /placement. ms: what the last look took."""
        return {
            "enabled": True,
            "interval_s": self._interval_s,
            "checked_at": self.checked_at,
            "checks": self.checks,
            "ms": round(self._seconds * 1000, 1),
            "unchanged_until": self._good_at,
            "changed": len(self.changes),
            "findings": [change.as_dict() for change in self.changes[:MOST_FINDINGS]],
        }

    def _patrol(self) -> None:
        while not self._closed.wait(self._interval_s):
            self._ask(0.0)


# --- one tensor, one hook


def _walk(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Every tensor by every name, and whether it is a buffer. Faster than `named_parameters`."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + key, parameter, False
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield dot + key, buffer, True


def _seen(tensor: torch.Tensor) -> Seen:
    first = parts_of(tensor)[0]
    try:
        opaque = first.is_mkldnn
        address = torch.ops.mkldnn.data_ptr(first) if opaque else first.data_ptr()
    except RuntimeError:  # a tensor that only wraps others has no storage of its own
        address = 0
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Seen(str(tensor.device), dtype, tuple(tensor.shape), address)


def _tensor_changes(name: str, was: Seen, now: Seen, before: Fingerprint) -> Iterator[Change]:
    if was.dtype != now.dtype:
        yield Change("F18", name, was.dtype, now.dtype)
    if name in before.moving:
        if was.shape != now.shape:
            yield Change("F18", name, f"of shape {was.shape}", f"of shape {now.shape}")
        return
    if was.device != now.device:
        yield Change("F18", name, f"on {was.device}", f"on {now.device}")
    elif name not in before.buffers and was.dtype == now.dtype:
        if was.shape != now.shape:
            yield Change("F18", name, f"of shape {was.shape}", f"of shape {now.shape}")
        elif was.address != now.address:
            yield Change("F18", name, "the tensor that was proven", "another in its place")


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return ()
    return tuple(hook.hooks) if isinstance(hook, SequentialHook) else (hook,)


def _words(hook: Any) -> str:
    kind = type(hook).__name__
    if not isinstance(hook, AlignDevicesHook):
        return f"under {kind}"
    device = hook.execution_device
    where = f"cuda:{device}" if isinstance(device, int) else str(device)
    return f"under {kind} for {where}{', offloading' if hook.offload else ''}"


def _hook_changes(
    prefix: str, before: tuple[HookSeen, ...], module: nn.Module | None
) -> Iterator[Change]:
    name = prefix or "the model"
    now = () if module is None else _hooks(module)
    was_words = " and ".join(hook.words for hook in before)
    now_words = " and ".join(_words(hook) for hook in now) or "without its hook"
    if len(now) != len(before) or was_words != now_words:
        yield Change("F17", name, was_words, now_words)
    elif any(hook.hook() is not other for hook, other in zip(before, now, strict=True)):
        yield Change("F17", name, was_words, f"{now_words}, which is another one")


def _stage(module: Any) -> Any:
    """Changes once, in the first forward of a bitsandbytes layer."""
    if type(module).__name__ == "Linear8bitLt":
        return getattr(module.weight, "CB", None) is None
    state = getattr(module.weight, "quant_state", None)
    return module.compute_type_is_set, getattr(state, "packing_format_for_cpu", False)


def _resting_in_ram(model: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, owner in offload_owners(model).items():
        if name in names and stored_on(owner) == "cpu":
            found[name] = owner.fetch()
    return found


def _some_numbers(tensor: torch.Tensor, turn: int) -> torch.Tensor:
    """A few numbers in a row, [at most NUMBERS_A_TENSOR]; another row at another turn."""
    step = turn * 7919  # a prime: sizes are round numbers, and all rows have their turn
    row = tensor.detach()
    while row.dim() > 1:
        row = row[step % row.shape[0]]
    row = row.reshape(-1)
    first = step % max(1, len(row) - NUMBERS_A_TENSOR + 1)
    return row[first : first + NUMBERS_A_TENSOR]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
