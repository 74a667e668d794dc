"""Who runs next, as a state machine without threads, model or clock."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule

from service.engine.scheduler import Scheduler
from service.engine.scheduler import Work
from service.engine.sequence import SamplingParams
from service.engine.sequence import Sequence
from service.engine.sequence import Stream
from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.errors import Overloaded
from service.errors import StepFailed

STOP = 99


def sequence(
    number: int, *, prompt: int = 1, max_tokens: int = 4, deadline: float | None = None
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_ids=frozenset({STOP}))
    return Sequence(number, tuple(range(prompt)), params, Stream(prompt), deadline)


def scheduler(*, max_sequences: int = 2, max_queue: int = 8, chunk_tokens: int = 4) -> Scheduler:
    return Scheduler(max_sequences=max_sequences, max_queue=max_queue, chunk_tokens=chunk_tokens)


def advance(scheduler: Scheduler, token: int = 7, now: float = 0.0) -> Work | None:
    """One step as the engine does it."""
    work = scheduler.next_work(now)
    if work is not None:
        scheduler.record(work, token if work.samples else None)
    return work


def taken(scheduler: Scheduler) -> list[Sequence]:
    ended = []
    while (one := scheduler.take_ended()) is not None:
        ended.append(one)
    return ended


def test_nothing_added_means_no_work() -> None:
    idle = scheduler()
    assert idle.next_work(0.0) is None
    assert not idle.has_work


def test_a_prompt_is_computed_in_chunks_and_only_the_last_samples() -> None:
    one = scheduler(chunk_tokens=4)
    one.add(sequence(0, prompt=10, max_tokens=2), step_s=0.0)
    steps = [advance(one) for _ in range(4)]
    assert [(work.start, work.ids, work.samples) for work in steps if work] == [
        (0, (0, 1, 2, 3), False),
        (4, (4, 5, 6, 7), False),
        (8, (8, 9), True),
        (10, (7,), True),
    ]
    assert [ended.outcome for ended in taken(one)] == ["length"]


def test_running_sequences_take_turns_and_a_long_prompt_stalls_nobody() -> None:
    two = scheduler(max_sequences=3, chunk_tokens=2)
    two.add(sequence(0, prompt=9), step_s=0.0)
    two.add(sequence(1), step_s=0.0)
    two.add(sequence(2), step_s=0.0)
    order = [work.sequence.id for work in (advance(two) for _ in range(9)) if work]
    assert order == [0, 1, 2] * 3


def test_waiting_sequences_are_admitted_in_order_as_places_come_free() -> None:
    busy = scheduler(max_sequences=2)
    for number in range(4):
        busy.add(sequence(number, max_tokens=1 + number % 2), step_s=0.0)
    order = [work.sequence.id for work in (advance(busy) for _ in range(6)) if work]
    assert order == [0, 1, 2, 1, 3, 3]
    assert (busy.running, busy.waiting) == (0, 0)


def test_a_stop_token_ends_the_sequence_and_is_not_delivered() -> None:
    one = scheduler()
    one.add(sequence(0), step_s=0.0)
    work = one.next_work(0.0)
    assert work is not None
    assert one.record(work, STOP) is False
    (ended,) = taken(one)
    assert (ended.outcome, ended.generated) == ("stop", [])


def test_the_last_allowed_token_is_delivered() -> None:
    one = scheduler()
    one.add(sequence(0, max_tokens=1), step_s=0.0)
    work = one.next_work(0.0)
    assert work is not None
    assert one.record(work, 5) is True
    assert [ended.outcome for ended in taken(one)] == ["length"]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    full = scheduler(max_sequences=1, max_queue=1)
    full.add(sequence(0, max_tokens=10), step_s=0.5)
    full.add(sequence(1), step_s=0.5)
    full.next_work(0.0)
    with pytest.raises(Overloaded, match="1 sequences are running and 1 are waiting") as refused:
        full.add(sequence(2), step_s=0.5)
    # One prefill chunk and ten tokens of half a second each: 5.5 s.
    assert refused.value.retry_after_s == 6


@pytest.mark.parametrize(("step_s", "retry_after_s"), [(0.0, 1), (1000.0, 60)])
def test_the_time_to_come_back_has_bounds(step_s: float, retry_after_s: int) -> None:
    full = scheduler(max_sequences=1, max_queue=0)
    full.add(sequence(0), step_s=step_s)
    with pytest.raises(Overloaded) as refused:
        full.add(sequence(1), step_s=step_s)
    assert refused.value.retry_after_s == retry_after_s


def test_a_queue_of_zero_still_lets_sequences_run() -> None:
    direct = scheduler(max_sequences=2, max_queue=0)
    direct.add(sequence(0), step_s=0.0)
    direct.add(sequence(1), step_s=0.0)
    assert advance(direct) is not None
    assert direct.running == 2


def test_cancelled_sequences_are_dropped_before_the_next_step_wherever_they_are() -> None:
    both = scheduler(max_sequences=1)
    running, waiting = sequence(0), sequence(1)
    both.add(running, step_s=0.0)
    both.add(waiting, step_s=0.0)
    advance(both)
    running.stream.cancel()
    waiting.stream.cancel()
    assert both.next_work(0.0) is None
    assert [ended.outcome for ended in taken(both)] == ["cancelled", "cancelled"]


def test_deadlines_end_the_running_and_the_waiting() -> None:
    both = scheduler(max_sequences=1)
    both.add(sequence(0, deadline=5.0), step_s=0.0)
    both.add(sequence(1, deadline=4.0), step_s=0.0)
    both.add(sequence(2), step_s=0.0)
    work = both.next_work(3.9)
    assert work is not None
    assert work.sequence.id == 0
    work = both.next_work(4.0)
    assert work is not None
    assert work.sequence.id == 0
    (late,) = taken(both)
    assert late.id == 1
    assert isinstance(late.outcome, DeadlineExceeded)
    work = both.next_work(5.0)
    assert work is not None
    assert work.sequence.id == 2
    assert [ended.id for ended in taken(both)] == [0]


def test_a_sequence_that_ended_during_its_step_keeps_that_end() -> None:
    one = scheduler()
    one.add(sequence(0, max_tokens=1), step_s=0.0)
    work = one.next_work(0.0)
    assert work is not None
    error = EngineStopped("closing")
    assert [ended.outcome for ended in one.end_all(error)] == [error]
    assert one.record(work, 5) is False
    one.end(work.sequence, "stop")
    assert [ended.outcome for ended in taken(one)] == [error]


@pytest.mark.parametrize(
    ("name", "value"), [("max_sequences", 0), ("max_queue", -1), ("chunk_tokens", 0)]
)
def test_impossible_settings_are_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; give"):
        scheduler(**{name: value})


class SchedulerMachine(RuleBasedStateMachine):
    """In any order of events nothing is lost, all ends once, and nobody waits too long."""

    MAX_SEQUENCES = 3
    MAX_QUEUE = 4
    PLACES = MAX_SEQUENCES + MAX_QUEUE
    CHUNK = 4

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler(
            max_sequences=self.MAX_SEQUENCES, max_queue=self.MAX_QUEUE, chunk_tokens=self.CHUNK
        )
        self.numbers = itertools.count()
        self.now = 0.0
        self.added: dict[int, Sequence] = {}
        self.ended: dict[int, Sequence] = {}
        self.seen: dict[int, list[int]] = {}  # tokens the model has seen, by sequence
        self.admitted: list[int] = []
        self.turns_waited: dict[int, int] = {}
        self.work: Work | None = None

    @rule(
        prompt=st.integers(1, 11),
        max_tokens=st.integers(1, 5),
        limit=st.none() | st.integers(0, 12),
    )
    def add(self, prompt: int, max_tokens: int, limit: int | None) -> None:
        deadline = None if limit is None else self.now + limit
        new = sequence(next(self.numbers), prompt=prompt, max_tokens=max_tokens, deadline=deadline)
        full = self.scheduler.waiting + self.scheduler.running == self.PLACES
        try:
            self.scheduler.add(new, step_s=0.1)
        except Overloaded:
            assert full
            return
        assert not full
        self.added[new.id] = new

    @precondition(lambda self: self.work is None)
    @rule(seconds=st.integers(0, 2))
    def begin_step(self, seconds: int) -> None:
        self.now += seconds
        work = self.scheduler.next_work(self.now)
        if work is None:
            assert not self.scheduler.has_sequences
            return
        one = work.sequence
        assert one.outcome is None
        assert not one.stream.cancelled
        assert one.deadline is None or self.now < one.deadline
        assert 1 <= len(work.ids) <= self.CHUNK
        # The model sees every token once and in order.
        assert work.start == len(self.seen.get(one.id, []))
        assert work.samples == (work.start + len(work.ids) == one.known)
        for number in self.turns_waited:
            self.turns_waited[number] += 1
        self.turns_waited[one.id] = 0
        if one.id not in self.admitted:
            self.admitted.append(one.id)
        self.work = work

    @precondition(lambda self: self.work is not None)
    @rule(token=st.sampled_from([1, 2, 3, STOP]))
    def finish_step(self, token: int) -> None:
        work, self.work = self.work, None
        assert work is not None
        delivered = self.scheduler.record(work, token if work.samples else None)
        self.seen.setdefault(work.sequence.id, []).extend(work.ids)
        if work.sequence.outcome is None or work.sequence.outcome == "length":
            assert delivered == work.samples
        else:
            assert not delivered

    @precondition(lambda self: self.work is not None)
    @rule()
    def fail_step(self) -> None:
        work, self.work = self.work, None
        assert work is not None
        self.scheduler.end(work.sequence, StepFailed("broken"))

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.added[data.draw(st.sampled_from(sorted(self.added)))].stream.cancel()

    @rule()
    def take_ended(self) -> None:
        for one in taken(self.scheduler):
            assert one.id not in self.ended, "ended twice"
            assert one.outcome is not None
            self.ended[one.id] = one
            self.turns_waited.pop(one.id, None)
            if one.id in self.seen:
                assert self.seen[one.id] == list(one.ids(0, len(self.seen[one.id])))

    @rule()
    def stop(self) -> None:
        self.scheduler.end_all(EngineStopped("stopping"))
        assert not self.scheduler.has_sequences

    @invariant()
    def the_limits_hold(self) -> None:
        assert self.scheduler.running <= self.MAX_SEQUENCES
        assert self.scheduler.waiting + self.scheduler.running <= self.PLACES

    @invariant()
    def nothing_is_lost(self) -> None:
        here = self.scheduler.running + self.scheduler.waiting
        open_ended = sum(one.outcome is None for one in self.added.values())
        assert here == open_ended

    @invariant()
    def nobody_waits_longer_than_one_round(self) -> None:
        for number, turns in self.turns_waited.items():
            if self.added[number].outcome is None:
                assert turns < self.MAX_SEQUENCES

    @invariant()
    def sequences_are_admitted_in_the_order_they_came(self) -> None:
        assert self.admitted == sorted(self.admitted)

    def teardown(self) -> None:
        if self.work is not None:
            self.finish_step(token=1)
        for _ in range(10_000):
            work = advance(self.scheduler, now=self.now)
            if work is None:
                break
            self.seen.setdefault(work.sequence.id, []).extend(work.ids)
        self.take_ended()
        assert self.ended.keys() == self.added.keys()
        assert not self.scheduler.has_work


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=80, stateful_step_count=60, deadline=None, database=None
)
