"""KV slots: one sequence, one row of every layer's cache. Bookkeeping only: no tensor is touched.

On a CPU the keys and values of a sequence lie in one piece, so that attention reads them where they
are. A sequence that begins like another of its owner, running or ended, starts with a copy of what
that one computed, or goes on in its slot.
"""

from collections import OrderedDict
from collections.abc import Sequence as List
from dataclasses import dataclass

from service.engine.sequence import Sequence

# a shorter common beginning is computed again: nearly as cheap, and slots keep what is longer
LEAST_SHARED = 16


@dataclass(eq=False)
class SlotHold:
    """The slot of one sequence. copy_from: a slot whose first `copied` tokens are copied first.

    stale: so many tokens of the slot may be NaN, left by a sequence that failed; those that are not
    this sequence's are wiped first, since attention multiplies what it hides by zero.
    """

    slot: int
    copy_from: int | None = None
    copied: int = 0
    stale: int = 0


class Slots:
    """The slots of one cache. Called with the engine's lock held, like the scheduler."""

    def __init__(self, count: int, *, share: bool) -> None:
        """share: False if a layer forgets tokens (a ring)."""
        self._share = share
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        # free slot -> its last owner, and the tokens it was computed from
        self._kept: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._held: dict[int, Sequence] = {}
        self._stale: dict[int, int] = {}  # free slot -> how many of its tokens may be NaN
        self.prefix_tokens = 0

    @property
    def used_tokens(self) -> int:
        """Tokens held by sequences that have a slot."""
        return sum(sequence.computed for sequence in tuple(self._held.values()))

    def admit(self, sequence: Sequence) -> bool:
        """Take a slot; set `computed` to the tokens found computed. False if all are taken."""
        if not self._free:
            return False
        donor, shared = self._longest(sequence)
        if donor is None or shared < LEAST_SHARED:
            hold, shared = SlotHold(self._least_useful()), 0
        elif donor in self._free:
            hold = SlotHold(donor)
        else:
            hold = SlotHold(self._least_useful(), donor, shared)
        del self._free[hold.slot]
        self._kept.pop(hold.slot, None)
        hold.stale = self._stale.pop(hold.slot, 0)
        self._held[hold.slot] = sequence
        sequence.hold = hold
        sequence.computed = shared
        self.prefix_tokens += shared
        return True

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Always True: a slot has room for the whole context."""
        return True

    def computed(self, sequence: Sequence) -> None:
        """Nothing to do: what a slot holds is read off its sequence."""

    def free(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Give the slot back; does nothing if it has none. failed: its content is of no use."""
        hold = sequence.hold
        if not isinstance(hold, SlotHold):
            return
        sequence.hold = None
        del self._held[hold.slot]
        self._free[hold.slot] = None
        if failed or not sequence.generated:  # no finite logits have shown that it is sound
            self._stale[hold.slot] = max(sequence.known, hold.stale)
        if self._share and not failed and sequence.computed >= LEAST_SHARED:
            self._kept[hold.slot] = (sequence.owner, sequence.ids(0, sequence.computed))

    def _longest(self, sequence: Sequence) -> tuple[int | None, int]:
        """The slot that holds most of the sequence's beginning, and how many tokens of it.

        Never the last known token, whose logits are wanted.
        """
        if not self._share or sequence.params.prompt_logprobs is not None:
            return None, 0
        wanted = sequence.ids(0, sequence.known - 1)
        best: tuple[int | None, int] = (None, 0)
        candidates = [
            (slot, ids) for slot, (who, ids) in self._kept.items() if who == sequence.owner
        ]
        for slot, other in self._held.items():
            if other.owner == sequence.owner:
                candidates.append((slot, other.ids(0, min(other.computed, len(wanted)))))
        for slot, ids in candidates:
            best = max(best, (slot, _common(wanted, ids)), key=lambda found: found[1])
        return best

    def _least_useful(self) -> int:
        """A free slot, one without content if there is one, else the one left longest ago."""
        empty = (slot for slot in self._free if slot not in self._kept)
        return min(empty, default=next(iter(self._free)))


def _common(a: List[int], b: List[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare in C; a loop over tokens would take the scheduler's time
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
