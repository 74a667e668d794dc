"""`compile: true`: the model's forward as torch.compile makes it, for the ragged path.

The whole model becomes one graph; attention stays a call into `attention`, because what it computes
depends on the step. Two graphs are made: of one token, and of any number of them. Compiling takes
a minute, so it happens before readiness, and never again: what neither graph takes runs as it is.
"""

import types
from collections.abc import Callable
from typing import TYPE_CHECKING
from typing import Any

import torch

from service.engine import proof
from service.engine.attention import NotCarried
from service.errors import LoadFailed
from service.placement.inputs import send

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from service.engine.ragged import Ragged


def refused(why: str) -> LoadFailed:
    """The error of a model that cannot be compiled. Nothing else is served in its place."""
    return LoadFailed(f"the model cannot be compiled: {why}", hint="set compile: false")


def bring(path: "Ragged", model: "PreTrainedModel", prove: Callable[[], None]) -> None:
    """Have the path run a compiled model, which `prove` finds to give the model's own logits.

    model: whole on one device, not quantised. prove: runs several tokens at once.
    Raises LoadFailed.
    """
    path.compiled = compiled = Compiled(model)
    try:
        with torch._inductor.config.patch(_settings(model)):
            prove()
            proof.alone(path)
    except NotCarried as reason:
        raise refused(str(reason)) from None
    except Exception as error:  # dynamo, inductor and a compiler of C++ raise what they like
        # the second line has the cause where the first one only names the backend
        said = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise refused(f"{type(error).__name__}: {said}") from error
    compiled.sealed = True


def _settings(model: "PreTrainedModel") -> dict[str, Any]:
    """Of torch._inductor, while it compiles.

    No pool of processes shall stay behind. On the CPU weights become constants, because torch takes
    nothing else for the opaque layout of packed ones (cpu_linears).
    """
    in_ram = all(weight.device.type == "cpu" for weight in model.parameters())
    return {"compile_threads": 1, "freezing": in_ram}


class Compiled:
    """Called like the model, with what `ragged.forward` and `graphs.Graphs` give it.

    Engine thread only. sealed: whether nothing is compiled any more.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        """model: whole on one device, without hooks. Compiles nothing yet."""
        self.sealed = False

        def step(ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            output = model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                return_dict=True,
                logits_to_keep=keep,
            )
            logits: torch.Tensor = output.logits
            return logits

        # what is compiled is kept with the code object: one of its own goes with this model
        self._code = step.__code__.replace()
        step = types.FunctionType(self._code, globals(), "step", None, step.__closure__)
        self._step = torch.compile(step, dynamic=True, fullgraph=True)

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor | int,
        **_: Any,
    ) -> types.SimpleNamespace:
        """ids and positions int64 [1, T]; logits_to_keep: rows, or as many of the last, 0: all.

        `logits` of the result are [1, rows, vocabulary], and one row more where it is one of
        several tokens: a size of 1 would be compiled for itself.
        """
        tokens, device = input_ids.shape[1], input_ids.device
        if isinstance(logits_to_keep, torch.Tensor):
            keep = send(logits_to_keep, device)
        else:
            first = tokens - logits_to_keep if logits_to_keep else 0
            keep = torch.arange(first, tokens, device=device)
        if tokens > 1 and len(keep) == 1:
            keep = keep.expand(2).contiguous()
        if self.sealed:
            with torch.compiler.set_stance("eager_on_recompile"):
                return types.SimpleNamespace(logits=self._step(input_ids, position_ids, keep))
        return types.SimpleNamespace(logits=self._step(input_ids, position_ids, keep))

    def release(self) -> None:
        """Drop what was compiled, and with it the model's weights that became constants."""
        from torch._dynamo.eval_frame import reset_code  # type: ignore[attr-defined]

        reset_code(self._code)
