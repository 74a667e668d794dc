"""Accelerators that are not there, with tensors that have no values.

torch lets a Python program be the backend of its spare device type (PrivateUse1), and fake tensors
know their shape, dtype and device only. Together they run a model's real code and accelerate's real
hooks over devices of any number; an operator that gets two devices raises, as on real ones. Both
are torch's own test tools, global to the process and without a promise: for a process of its own.
"""

import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# torch's name of the pretended device type
NAME = "pretended"


class NotAvailable(Exception):
    """This torch cannot pretend; the text says why."""


def shown(text: str, kind: str) -> str:
    """A text with the devices' names as the plan has them. kind: of the plan's devices, "cuda"."""
    return re.sub(rf"\b{NAME}\b", kind, text)


@contextmanager
def machine(kind: str) -> Iterator[None]:
    """In here every device of this kind is pretended, and every new tensor has no values.

    Nothing computes gradients: autograd would ask the device for streams. Raises NotAvailable.
    """
    _install()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode(), _Translated(kind):
        yield


class _Backend:
    """What torch asks of the Python module of a device type."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1024

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing is random where nothing has a value."""


def _install() -> None:
    """Make the pretended device type known, once in a process. Raises NotAvailable."""
    if getattr(torch, NAME, None) is not None:
        return
    try:
        from torch._subclasses.fake_tensor import FakeTensor
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError as error:
        raise NotAvailable(f"torch {torch.__version__} cannot pretend devices ({error})") from None
    try:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    except (RuntimeError, AttributeError, TypeError) as error:
        raise NotAvailable(
            f"torch {torch.__version__} refuses to pretend devices: {str(error)[:200]}"
        ) from None
    made: Callable[..., Any] = FakeTensor.__new__

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # accelerate replaces a parameter by `type(parameter)(value)`; here that type is FakeTensor
        if len(args) == 1 and "fake_mode" not in kwargs:
            return torch.nn.Parameter(args[0], requires_grad=False)
        return made(cls, *args, **kwargs)

    setattr(FakeTensor, "__new__", staticmethod(new))  # noqa: B010 - mypy forbids to assign it


class _Translated(TorchFunctionMode):
    """Calls that name a device of `kind` get the pretended one of that number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = re.compile(rf"{re.escape(kind)}(?=:|$)")

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args = tuple(map(self._device, args))
        named = {key: self._device(value) for key, value in (kwargs or {}).items()}
        if func is torch.Tensor.data_ptr:
            # fake tensors have none; accelerate tells tied weights by it
            return args[0].untyped_storage()._cdata
        if func is torch.Tensor.cuda:
            index = args[1] if len(args) > 1 else named.get("device")
            return args[0].to(f"{NAME}:{index or 0}" if isinstance(index, int | None) else index)
        if func is torch.Tensor.to:
            _forget_value(args[0])
        if func in (torch.tensor, torch.as_tensor) and named.get("device") is not None:
            device = named.pop("device")
            tensor = func(*args, **named)
            _forget_value(tensor)
            return tensor.to(device)
        return func(*args, **named)

    def _device(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(self.kind.sub(NAME, str(value)))
        return self.kind.sub(NAME, value) if isinstance(value, str) else value


def _forget_value(tensor: torch.Tensor) -> None:
    """A small constant keeps its value inside; torch would compute with it, on no real device."""
    if getattr(tensor, "constant", None) is not None:
        setattr(tensor, "constant", None)  # noqa: B010 - an attribute of fake tensors only
