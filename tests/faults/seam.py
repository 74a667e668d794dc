"""Where faults enter a real worker: the model, place_inputs, the tokenizer, the clock.

Installed by the strategy `faulty` while it loads; what happens is in the control file.
"""

import functools
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase

from service.engine import doing
from tests.faults.control import FAULTY_TEXT
from tests.faults.control import FAULTY_TOKEN
from tests.faults.control import SECRET
from tests.faults.control import Control

log = logging.getLogger(__name__)
_control: Control | None = None


def install(model: PreTrainedModel, path: Path) -> None:
    """Once a process."""
    global _control
    control = _control = Control(path)
    step: dict[str, torch.Tensor] = {}

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        step["positions"] = torch.empty(0) if positions is None else positions
        time.sleep(control.read().get("step_s", 0.0))
        _happen(control, "forward", control.due("forward", _list(positions)))

    def embedded(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        positions = step.get("positions")
        if positions is None or control.due("forward", _list(positions)) != "nan":
            return None
        first, last = control.read()["forward"]["at"]
        hit = (positions >= first) & (positions < last)
        return output.masked_fill(hit[..., None], float("nan"))

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(embedded)
    _break_tokenizer(control)
    _move_clock(control)


def placed(inputs: dict[str, torch.Tensor]) -> Any:
    """What place_inputs returns: the inputs, or nonsense."""
    if _control is None:
        return inputs
    what = _control.due("place_inputs", _list(inputs.get("position_ids")))
    _happen(_control, "place_inputs", what)
    if what == "list":
        return list(inputs.values())
    if what == "shape":
        return {name: tensor[:, :-1] for name, tensor in inputs.items()}
    return None if what == "nothing" else inputs


def use_pages() -> None:
    """Keep KV in pages, as on CUDA, and say when a sequence gives way for want of them."""
    from service.engine.runner import Runner
    from service.engine.scheduler import Scheduler

    Runner.__init__ = functools.partialmethod(Runner.__init__, paged=True)  # type: ignore[assignment,method-assign]
    preempt = Scheduler._preempt

    def told(self: Scheduler, sequence: Any) -> None:
        log.warning("a sequence gives way")
        preempt(self, sequence)

    Scheduler._preempt = told  # type: ignore[method-assign]


def _happen(control: Control, place: str, what: str | None) -> None:
    if what == "raise":
        raise RuntimeError(f"the kernel of {SECRET} failed")
    if what == "memory":
        raise torch.OutOfMemoryError(f"out of memory for {SECRET}")
    if what == "hold":
        usual = doing.HANGS_AFTER_S
        doing.HANGS_AFTER_S = control.read().get("hangs_after_s", usual)
        control.hold(place)
        doing.HANGS_AFTER_S = usual
    if what == "leave":
        sys.exit(1)


def _break_tokenizer(control: Control) -> None:
    call, decode = PreTrainedTokenizerBase.__call__, PreTrainedTokenizerBase.decode

    def calling(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, str) and FAULTY_TEXT in text:
            raise RuntimeError(f"no table in {SECRET}")
        return call(self, text, *args, **kwargs)

    def decoding(self: Any, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if control.read().get("decode") == "raise" and FAULTY_TOKEN in token_ids:
            raise RuntimeError(f"no table in {SECRET}")
        return decode(self, token_ids, *args, **kwargs)

    PreTrainedTokenizerBase.__call__ = calling  # type: ignore[method-assign]
    PreTrainedTokenizerBase.decode = decoding  # type: ignore[method-assign]


def _move_clock(control: Control) -> None:
    real = time.time
    time.time = lambda: real() + control.read().get("clock_s", 0.0)


def _list(positions: torch.Tensor | None) -> list[int]:
    return [] if positions is None else positions.flatten().tolist()
