"""Linear layers that read the same tensor, computed in one call: q, k and v, or gate and up.

Which these are is seen in a trial forward, not known by name. The model keeps its layers: the first
of a group that is called computes all, the others take their part. Each part is taken once, and
what belongs to another input is never returned, so nothing is left of a step that went through.
"""

import logging
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)


class Shared:
    """Of one group. sizes: out_features of its layers, in the order of their places."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = list(sizes)
        self._held: tuple[torch.Tensor, list[torch.Tensor | None]] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is held of an input."""
        return self._held is None

    def part(
        self,
        place: int,
        input: torch.Tensor,
        product: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """[..., in_features] -> [..., sizes[place]], a view of what `product` gives for all.

        A step that raised half way leaves its parts until the next call, which has another input.
        """
        held = self._held
        taken = held[1][place] if held is not None and held[0] is input else None
        if held is None or taken is None:
            parts: list[torch.Tensor | None] = list(torch.split(product(input), self.sizes, -1))
            held = self._held = (input, parts)
            taken = parts[place]
        held[1][place] = None
        if all(part is None for part in held[1]):
            self._held = None
        if taken is None:
            raise RuntimeError("two threads ran one model at the same time (F6)")
        return taken


def find(model: Any, layers: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Names of layers that can be computed together, group by group, in the order of their calls.

    They have one parent, were called once, with one unchanged tensor, and have weights of one
    dtype. model: on the CPU, in eval mode; it gets two tokens, twice. None are found in a model
    that raises: the forward of the certificate says what is wrong with it. None either in one that
    needs their outputs in one piece.
    """
    calls: dict[str, list[tuple[torch.Tensor, int]]] = {}

    def note(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, given: tuple[Any, ...]) -> None:
            calls.setdefault(name, []).append((given[0], given[0]._version))

        return seen

    if not _runs(model, [it.register_forward_pre_hook(note(name)) for name, it in layers.items()]):
        return []
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, found in calls.items():
        if len(found) == 1:
            tensor, version = found[0]
            key = (name.rpartition(".")[0], id(tensor), version, layers[name].weight.dtype)
            groups.setdefault(key, []).append(name)
    together = [names for names in groups.values() if len(names) > 1]
    members = [layers[name] for names in together for name in names]
    if members and not _runs(model, [it.register_forward_hook(_as_part) for it in members]):
        return []
    return together


def _as_part(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
    """The same output as a view of a wider tensor, which is what a group gives."""
    return torch.cat((output, output), -1)[..., : output.shape[-1]]


def _runs(model: Any, hooks: list[RemovableHandle]) -> bool:
    """Whether a forward of two tokens goes through with these hooks, which are removed again.

    Outside inference mode, where tensors count their changes.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]]), use_cache=False)
    except Exception:  # a model may raise anything; its layers are then computed one by one
        log.debug("%s did not run two tokens", type(model).__name__, exc_info=True)
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def with_alone(names: Collection[str], groups: list[list[str]]) -> list[list[str]]:
    """The groups, and a group of its own for every other name."""
    inside = {name for group in groups for name in group}
    return [*groups, *([name] for name in names if name not in inside)]
