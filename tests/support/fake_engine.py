"""An engine without a model: it answers what it is told to, at once, through the real Stream."""

import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

from service.engine.params import SamplingParams
from service.engine.sequence import Stream
from service.engine.stats import EngineStats
from service.errors import ServiceError


@dataclass
class Submission:
    """One prompt that was submitted."""

    ids: list[int]
    params: SamplingParams
    deadline: float | None
    stream: Stream
    owner: str = ""


@dataclass
class FakeEngine:
    """Says `answer` (token ids), cut at max_tokens and at the first of stop_ids.

    refuse: raised by submit_all. fail: the stream ends with it after the answer. hang: the answer
    never ends. embed: gives the embedding of a prompt, for those that want one. stream: makes the
    streams.
    """

    answer: Sequence[int] = tuple(b"Hello")
    refuse: ServiceError | None = None
    fail: ServiceError | None = None
    hang: bool = False
    embed: Callable[[Sequence[int]], bytes] = lambda ids: b""
    stream: Callable[[int], Stream] = Stream
    submissions: list[Submission] = field(default_factory=list)

    def submit_all(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        deadline: float | None = None,
        *,
        owner: str = "",
    ) -> list[Stream]:
        if self.refuse is not None:
            raise self.refuse
        streams = []
        for ids, params in prompts:
            stream = self.stream(len(ids))
            stream.admitted_at = time.monotonic()
            self.submissions.append(Submission(list(ids), params, deadline, stream, owner))
            if params.pooled and self.fail is None:
                stream.embedding = self.embed(ids)
            self._play(stream, params, () if params.pooled else self.answer)
            streams.append(stream)
        return streams

    def stats(self) -> EngineStats:
        return EngineStats(running=0, waiting=0, steps=0, tokens=0, kv_tokens=0, failed=0)

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
