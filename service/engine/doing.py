"""What an engine's thread is doing, for those who ask from other threads."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.engine.embedding import Way
    from service.engine.runner import Path

# What takes so long, and so many times as long as steps do, is taken to hang.
HANGS_AFTER_S = 60.0
HANGS_AFTER_STEPS = 10


class Doing:
    """What the engine thread is in. It alone begins and ends; any thread may ask."""

    def __init__(self) -> None:
        self._doing: tuple[str, float] | None = None

    def begin(self, what: str, now: float) -> None:
        self._doing = (what, now)

    def begin_step(self, sequences: int, now: float) -> None:
        self.begin(f"a step of {sequences} sequence{'s' if sequences > 1 else ''}", now)

    def end(self) -> None:
        """It waits for work: as long as it likes."""
        self._doing = None

    def hangs(self, now: float, step_s: float) -> str | None:
        """What is taken to hang, and for how long it has run; None if nothing does.

        step_s: how long a step takes at present, in seconds; 0 if none has been run.
        """
        doing = self._doing
        if doing is None:
            return None
        what, began = doing
        if now - began <= max(HANGS_AFTER_S, HANGS_AFTER_STEPS * step_s):
            return None
        return f"{what} has been running for {now - began:.0f} s"


def described(way: "Path | Way | None", hangs: str | None) -> dict[str, object]:
    """The `engine` object of GET /placement; all null before the start and after the end.

    path: how batches are run. why: what keeps it from the faster path, or "". graphs: whether
    steps are replayed as CUDA graphs. compiled: whether what runs is what torch.compile made of the
    model. kv_reserved: device -> bytes of KV allocated. hangs: see `Doing.hangs`.
    """
    return {
        "path": way and way.name,
        "why": way and way.why,
        "graphs": way and way.graphs is not None,
        "compiled": way and way.compiled is not None,
        "kv_reserved": way and dict(way.kv_bytes),
        "hangs": hangs,
    }
