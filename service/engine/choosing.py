"""Logits to the next token of every sequence of a batch, in one pass on the logits' device.

What a row asks for acts in this order, which is vLLM's with transformers' order of the cuts:
finite check and logprobs (of the raw logits) - constraint - logit_bias and min_tokens -
repetition, frequency and presence penalty - temperature - top-k - top-p - min-p - draw.

- Logprobs are log-softmax of the logits as the model gave them, before anything else acts; vLLM's
  default, `raw_logprobs`. The chosen token may therefore not be among the likeliest.
- repetition_penalty counts prompt and answer: a positive logit is divided by it, a negative one
  multiplied (Keskar et al. 2019, arXiv:1909.05858, as transformers does it). frequency_penalty is
  taken off once for each time the token is in the answer, presence_penalty once if it is there at
  all; neither looks at the prompt ("text so far" in OpenAI's reference, read as vLLM reads it).
- Tokens as likely as the last that top-k or top-p keeps are kept as well, as transformers' top-k
  does: which of two equals may be drawn is no matter of chance. top_k 1 and top_p 0 are greedy.
- One random number a token, a function of seed, choice and place in the answer alone: neighbours,
  the place in the batch and recomputation after a preemption cannot change it.

Rows that ask for nothing cost an argmax and a finite check. Engine thread only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

import numpy as np
import torch

from service.engine import drawing
from service.engine.editing import broken
from service.engine.editing import edit
from service.engine.editing import upload
from service.engine.state import Kind
from service.engine.state import State
from service.errors import InvalidRequest
from service.errors import NonFiniteLogits
from service.errors import RequestError
from service.placement.inputs import send

# Top-p looks at so many of the likeliest first; a row whose nucleus is larger is looked at again.
FEW = 1024


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of one sequence.

    logprob: natural logarithm of its probability, if asked for. top: the likeliest tokens with
    theirs, likeliest first, as many as asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def greedy_only(states: Sequence[State]) -> bool:
    """Whether `greedy` alone answers this batch."""
    return all(state.plain for state in states)


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Likeliest token, int64 [n], and whether all of its row is finite, bool [n].

    logits: any float dtype [n, vocabulary], any device. No sync; can be captured in a CUDA graph.
    The first of equals wins. A maximum and a minimum show any NaN and infinity, in a third of the
    time that looking at every value takes.
    """
    largest, tokens = logits.max(-1)
    return tokens, largest.isfinite() & logits.amin(-1).isfinite()


def choose(logits: torch.Tensor, states: Sequence[State]) -> list[Chosen | RequestError]:
    """The next token of every sequence: `launch` and `collect` in one."""
    return launch(logits, states).collect()


@torch.inference_mode()
def launch(
    logits: torch.Tensor,
    states: Sequence[State],
    likeliest: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> "Pending":
    """Enqueue the choice and the transfer of its result; does not wait for the device.

    logits: any float dtype [n, vocabulary], row i of states[i]; neither changed nor kept, but they
    must stay as they are until `collect`. likeliest: what `greedy` returned for them, if it has
    run, in a CUDA graph for instance. Asks every constraint what it allows. Raises ValueError if
    there are not as many rows as states.
    """
    if logits.ndim != 2 or len(logits) != len(states):
        raise ValueError(f"{len(states)} states, but logits of shape {tuple(logits.shape)}")
    batch = _Batch(logits, states)
    tokens, finite = greedy(logits) if likeliest is None else likeliest
    status = torch.stack((tokens, finite.long()))
    if batch.rows:
        _pick(batch, status)
    reports = report(logits, batch.reported, batch.most, status[0]) if batch.reported else None
    return Pending(batch, _fetch(status), None if reports is None else _fetch(reports))


# Flags beside a token: the row is finite, nothing was left to choose from, the nucleus was larger
# than what was looked at.
_FINITE, _NOTHING_LEFT, _UNKNOWN = 1, 2, 4


class _Batch:
    """Which rows need what, and the scores of those that need any.

    rows: in the order of their kinds; row i of the scores is row rows[i] of the logits.
    """

    def __init__(self, logits: torch.Tensor, states: Sequence[State]) -> None:
        self.logits = logits
        self.states = tuple(states)
        self.device = logits.device
        self.vocabulary = logits.shape[1]
        self.errors: dict[int, RequestError] = {}
        kinds = {row: kind for row, s in enumerate(states) if (kind := s.kind(self.vocabulary))}
        self.rows = sorted(kinds, key=kinds.__getitem__)
        self._ordered = [kinds[row] for row in self.rows]
        self.reported = [row for row, s in enumerate(states) if s.params.logprobs is not None]
        self.most = max((states[row].params.logprobs or 0 for row in self.reported), default=0)
        self.most = min(self.most, self.vocabulary)
        self.scores: torch.Tensor | None = None  # weights, from the first drawn row on
        self.numbers: torch.Tensor | None = None  # [5, rows]: State.numbers
        self.total: torch.Tensor | None = None  # mass of the limited rows

    def start(self, kind: Kind) -> int:
        """The first row of the scores that is of this kind or a later one."""
        return sum(other < kind for other in self._ordered)


def _pick(batch: _Batch, status: torch.Tensor) -> None:
    """Replace tokens of `status` by those of the rows that need more than an argmax."""
    every = batch.rows == list(range(len(batch.states)))
    rows = upload(batch.rows, np.int64, batch.device)
    scores = drawing.scores(batch.logits, None if every else rows)
    errors = edit(scores, batch.vocabulary, [batch.states[row] for row in batch.rows])
    batch.errors.update((batch.rows[place], error) for place, error in errors.items())
    flags = ~scores.amax(-1).isfinite() * _NOTHING_LEFT
    drawn = batch.start(Kind.DRAWN)
    picked = torch.empty_like(flags)
    if drawn > 0:
        picked[:drawn] = scores[:drawn].argmax(-1)
    if drawn < len(rows):
        picked[drawn:], unknown = _draw(batch, scores[drawn:])
        flags[len(rows) - len(unknown) :] += unknown * _UNKNOWN
    # A row that is not finite draws anything, the padding too; it is looked up before it is failed.
    status[0].index_copy_(0, rows, picked.clamp(max=batch.vocabulary - 1))
    status[1].index_add_(0, rows, flags)


def _draw(batch: _Batch, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the drawn rows, and which of the limited rows, the last, are to be drawn again.

    weights: their scores, which become weights in place.
    """
    first, cut, limited = (batch.start(k) for k in (Kind.DRAWN, Kind.CUT, Kind.LIMITED))
    batch.numbers = upload(
        np.array([batch.states[row].numbers() for row in batch.rows]).T, np.float64, batch.device
    )
    temperature, top_k, top_p, min_p, points = batch.numbers
    batch.scores = weights
    drawing.to_weights(weights, temperature[first:])
    unknown = torch.zeros(0, dtype=torch.bool, device=batch.device)
    lowest = min_p[cut:limited].float()
    if limited < len(batch.rows):
        tail = weights[limited - first :]
        batch.total = drawing.mass(tail)
        look = min(batch.vocabulary, max(_look(batch.states[r]) for r in batch.rows[limited:]))
        least, known = drawing.least(
            tail, batch.total, top_k[limited:], top_p[limited:], min_p[limited:], look
        )
        unknown = ~known
        lowest = torch.cat((lowest, least))
    if cut < len(batch.rows):
        drawing.forbid_below(weights[cut - first :], lowest)
    return drawing.draw(weights, points[first:]), unknown


def _look(state: State) -> int:
    """How many of the likeliest to look at; the result does not depend on it."""
    return state.params.top_k if 0 < state.params.top_k <= FEW else FEW


def _draw_again(batch: _Batch, rows: Sequence[int]) -> list[int]:
    """Tokens of limited rows whose nucleus was too large for the first look."""
    if batch.scores is None or batch.numbers is None or batch.total is None:
        raise RuntimeError("no limited row was drawn")
    first, limited = batch.start(Kind.DRAWN), batch.start(Kind.LIMITED)
    places = upload([batch.rows.index(row) for row in rows], np.int64, batch.device)
    weights = batch.scores[places - first]
    _, top_k, top_p, min_p, points = batch.numbers[:, places]
    total = batch.total[places - limited]
    least, _ = drawing.least(weights, total, top_k, top_p, min_p, weights.shape[1])
    drawing.forbid_below(weights, least)
    tokens: list[int] = drawing.draw(weights, points).tolist()
    return tokens


# --- results


def report(
    logits: torch.Tensor, rows: Sequence[int], most: int, tokens: torch.Tensor
) -> torch.Tensor:
    """Logprobs of rows, float64 [rows, 1 + 2 most]: the row's token, the likeliest, their ids.

    tokens: int64 [n], of all rows.
    """
    at = send(torch.tensor(rows), logits.device)
    raw = logits.index_select(0, at).float()
    values, ids = raw.topk(most, dim=-1)
    found = raw.gather(1, tokens[at][:, None])
    logprobs = torch.cat((found, values), dim=1) - raw.logsumexp(-1, keepdim=True)
    return torch.cat((logprobs.double(), ids.double()), dim=1)


def _fetch(tensor: torch.Tensor) -> torch.Tensor:
    """A device's tensor on its way to the CPU: read it after `Pending` has waited."""
    return tensor.to("cpu", non_blocking=tensor.device.type == "cuda")


@dataclass
class Pending:
    """A choice under way on the device."""

    _batch: _Batch
    _status: torch.Tensor  # [2, n] tokens and flags, complete after _done
    _reports: torch.Tensor | None
    _done: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self._batch.device.type == "cuda":
            self._done = torch.cuda.current_stream(self._batch.device).record_event()

    @torch.inference_mode()
    def collect(self) -> list[Chosen | RequestError]:
        """Wait for the tokens, and tell every state its own. Call it once.

        In the place of a token stands the error with which that sequence fails: NonFiniteLogits if
        the model gave it a NaN or an infinity, InvalidRequest if what the request asks for leaves
        no token, StepFailed if its constraint broke. Its state has not moved.
        """
        batch = self._batch
        if self._done is not None:
            self._done.synchronize()
        tokens, flags = self._status.tolist()
        reports = [] if self._reports is None else self._reports.tolist()
        sound = [row for row, flag in enumerate(flags) if flag & _FINITE]
        again = [row for row in sound if flags[row] & _UNKNOWN and not flags[row] & _NOTHING_LEFT]
        if again:
            for row, token in zip(again, _draw_again(batch, again), strict=True):
                tokens[row] = token
            late = [row for row in again if row in batch.reported]
            if late:
                moved = torch.tensor(tokens, device=batch.device)
                found = report(batch.logits, late, 0, moved).tolist()
                for row, its in zip(late, found, strict=True):
                    reports[batch.reported.index(row)][0] = its[0]
        if len(sound) < len(flags):
            _name_garbage(batch, sorted(set(range(len(flags))) - set(sound)))
        for row in sound:
            if flags[row] & _NOTHING_LEFT:
                batch.errors.setdefault(row, _nothing_left())
        told = dict(zip(batch.reported, reports, strict=True))
        return [_settle(batch, row, token, told.get(row)) for row, token in enumerate(tokens)]


def _settle(batch: _Batch, row: int, token: int, its: list[float] | None) -> Chosen | RequestError:
    if row in batch.errors:
        return batch.errors[row]
    state = batch.states[row]
    try:
        state.accept(token)
    except Exception as error:  # of the constraint: not the engine's code, and one row's only
        return broken(error)
    if its is None:
        return Chosen(token)
    count = min(state.params.logprobs or 0, batch.most)
    values, ids = its[1 : 1 + count], its[1 + batch.most :][:count]
    return Chosen(token, its[0], tuple(zip(map(int, ids), values, strict=True)))


def _nothing_left() -> RequestError:
    return InvalidRequest(
        "Constraint, logit_bias and min_tokens together leave no token that could come next.",
        hint="drop min_tokens, or allow what the constraint ends with",
    )


def _name_garbage(batch: _Batch, rows: Sequence[int]) -> None:
    """An error for each of the rows that are not finite, with how much of it is not."""
    at = send(torch.tensor(rows), batch.device)
    counts = (~batch.logits.index_select(0, at).isfinite()).sum(-1).tolist()
    for row, bad in zip(rows, counts, strict=True):
        batch.errors[row] = NonFiniteLogits(
            f"The model produced {bad} NaN or infinite values among {batch.vocabulary} logits; "
            "nothing was sampled from them."
        )
