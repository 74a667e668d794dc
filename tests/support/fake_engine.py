"""An engine without a model: it answers what it is told to, at once, through the real Stream."""

from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from service.engine.sequence import SamplingParams
from service.engine.sequence import Stream
from service.errors import ServiceError


@dataclass
class Submission:
    """One call of `submit`."""

    ids: list[int]
    params: SamplingParams
    deadline: float | None
    stream: Stream


@dataclass
class FakeEngine:
    """Says `answer` (token ids), cut at max_tokens and at the first of stop_ids.

    refuse: raised by submit. fail: the stream ends with it after the answer. hang: the answer
    never ends.
    """

    answer: Sequence[int] = tuple(b"Hello")
    refuse: ServiceError | None = None
    fail: ServiceError | None = None
    hang: bool = False
    submissions: list[Submission] = field(default_factory=list)

    def submit(
        self, ids: Sequence[int], params: SamplingParams, deadline: float | None = None
    ) -> Stream:
        if self.refuse is not None:
            raise self.refuse
        stream = Stream(len(ids))
        self.submissions.append(Submission(list(ids), params, deadline, stream))
        self._play(stream, params, self.answer)
        return stream

    def stats(self) -> dict[str, Any]:
        return {"running": 0, "waiting": 0}

    def _play(self, stream: Stream, params: SamplingParams, answer: Iterable[int]) -> None:
        for token in answer:
            if token in params.stop_ids:
                stream.end("stop")
                return
            stream.put(token)
            if stream.completion_tokens == params.max_tokens:
                stream.end("length")
                return
        if self.fail is not None:
            stream.fail(self.fail)
        elif not self.hang:
            stream.end("stop")
