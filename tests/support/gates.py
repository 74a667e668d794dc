"""A place in a strategy file where a test can hold its thread: `gate("name").pass_through()`."""

import threading

# nothing waits this long unless a test has failed
PATIENCE_S = 60.0


class Gate:
    def __init__(self) -> None:
        self._reached, self._open = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        """Wait until a test opens it."""
        self._reached.set()
        self._open.wait(PATIENCE_S)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()


_gates: dict[str, Gate] = {}


def gate(name: str) -> Gate:
    """The gate of that name; a test makes its own with `new_gate`."""
    return _gates[name]


def new_gate(name: str) -> Gate:
    """A closed gate, in place of an earlier one of the name."""
    _gates[name] = Gate()
    return _gates[name]
