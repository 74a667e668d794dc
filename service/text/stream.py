"""Token ids to text, piece by piece: no split UTF-8, no stop strings."""

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Literal
from typing import NamedTuple

from service.engine.sequence import Stream
from service.errors import EngineStopped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has four bytes at most, so text that is still unreadable after this many tokens is
# not going to become readable: without a bound, each token of such an answer would decode all of
# it again.
HELD_TOKENS = 32
LONGEST_CHARACTER = 4


class Step(NamedTuple):
    """Text that became certain with one token, or at the end with none."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Piece:
    """Text that may be shown now; empty when nothing can be.

    completion_tokens: tokens generated up to here. finish_reason: set on the last piece only.
    steps: the same text token by token, for someone who takes the answer apart.
    """

    text: str
    completion_tokens: int
    finish_reason: Literal["stop", "length"] | None = None
    steps: tuple[Step, ...] = ()


def pieces(
    tokenizer: "PreTrainedTokenizerBase",
    stream: Stream,
    stop: Sequence[str] = (),
    tick_s: float | None = None,
    *,
    control: bool = False,
) -> Iterator[Piece]:
    """The text of a sequence as it arrives. The last piece, and only that one, has a finish reason.

    stop: strings that end the answer. They are found across token boundaries, held back while
    partial, never shown; the sequence is then cancelled in the engine. An empty piece comes
    whenever `tick_s` seconds bring no token, so that the caller can look after its client.
    control: show control tokens as well, and steps, for someone who takes the answer apart.
    Raises the ServiceError with which the sequence failed, or EngineStopped if someone else
    cancelled it.
    """
    detokenizer = Detokenizer(tokenizer, control=control)
    finder = StopFinder(stop)
    count = 0
    while True:
        try:
            arrived = stream.read(tick_s)
        except TimeoutError:
            yield Piece("", count)
            continue
        if not arrived:
            break
        steps: list[Step] = []
        # With stop strings one token at a time, so that tokens after the stop are not counted.
        for ids in [[token] for token in arrived] if stop or control else [arrived]:
            count += len(ids)
            steps.append(Step(finder.feed(detokenizer.feed(ids)), len(ids)))
            if finder.found:
                stream.cancel()
                yield _piece(steps, count, "stop", control)
                return
        yield _piece(steps, count, None, control)
    text = finder.feed(detokenizer.flush())
    if finder.found:
        yield _piece([Step(text, 0)], count, "stop", control)
        return
    if stream.finish_reason is None or stream.finish_reason == "cancelled":
        raise EngineStopped("the sequence was cancelled before it was complete")
    yield _piece([Step(text + finder.flush(), 0)], count, stream.finish_reason, control)


def _piece(
    steps: list[Step], count: int, reason: Literal["stop", "length"] | None, control: bool
) -> Piece:
    text = "".join(step.text for step in steps)
    return Piece(text, count, reason, tuple(steps) if control else ())


class Detokenizer:
    """Token ids in, text out, without ever taking text back. Special tokens are left out, unless
    `control`.

    All that `feed` and `flush` return, joined, equals `tokenizer.decode` of all ids. The one
    exception: tokenizers with byte fallback (Llama 2) make a whole run of bytes unreadable when
    its end is, and the readable start of such a run has been shown by then.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, control: bool = False) -> None:
        self._tokenizer = tokenizer
        self._control = control
        # The ids shown last stay in the window before those still to be shown: the text of a token
        # depends on what stands before it (a leading space, the first bytes of a character).
        self._window: list[int] = []
        self._shown = 0

    def feed(self, ids: Sequence[int]) -> str:
        """Text that has become certain with these ids."""
        self._window += ids
        shown, whole = self._decode(self._window[: self._shown]), self._decode(self._window)
        held = len(self._window) - self._shown
        if whole.endswith(REPLACEMENT):
            return self._give_up(shown, whole) if held > HELD_TOKENS else ""
        if len(whole) <= len(shown):  # special tokens, or a space that the next word brings
            if held > HELD_TOKENS:
                del self._window[self._shown :]
            return ""
        self._move(len(self._window))
        return whole[len(shown) :]

    def flush(self) -> str:
        """The rest, readable or not; the sequence has ended."""
        shown, whole = self._decode(self._window[: self._shown]), self._decode(self._window)
        self._move(len(self._window))
        return whole[len(shown) :]

    def _give_up(self, shown: str, whole: str) -> str:
        """Show unreadable text up to a place that no later token can change."""
        last = len(self._window) - LONGEST_CHARACTER
        for cut in range(last, last - LONGEST_CHARACTER, -1):
            start = self._decode(self._window[:cut])
            if start + self._decode(self._window[cut:]) == whole:
                self._move(cut)
                return start[len(shown) :]
        return ""

    def _move(self, shown: int) -> None:
        """The first `shown` ids of the window have been shown; drop those shown before."""
        del self._window[: self._shown]
        self._shown = shown - self._shown

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, control=self._control)


def decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int], *, control: bool = False) -> str:
    """Text of ids, special tokens left out unless `control`, spaces as the decoder leaves them."""
    text = tokenizer.decode(
        ids, skip_special_tokens=not control, clean_up_tokenization_spaces=False
    )
    return text if isinstance(text, str) else "".join(text)


class StopFinder:
    """Finds the first stop string to be completed, however the text is cut into pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Text that can be shown: what cannot be the start of a stop string."""
        if not self._stop:
            return text
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max(self._partial(stop) for stop in self._stop)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def flush(self) -> str:
        """What was held back and turned out not to be a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _partial(self, stop: str) -> int:
        """How many characters at the end of the held text are the start of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
