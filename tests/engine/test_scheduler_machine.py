"""In any order of events: nothing is lost, all ends once, memory is right, and work goes on."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule

from service.engine import slots
from service.engine.pages import Group
from service.engine.pages import PageHold
from service.engine.pages import Pages
from service.engine.scheduler import Batch
from service.engine.scheduler import Memory
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.engine.slots import SlotHold
from service.engine.slots import Slots
from service.errors import EngineStopped
from service.errors import Overloaded
from service.errors import StepFailed
from service.placement import kv
from tests.engine.scripted import Kept
from tests.engine.sequences import STOP
from tests.engine.sequences import sequence

MAX_SEQUENCES = 3
MAX_QUEUE = 4
PLACES = MAX_SEQUENCES + MAX_QUEUE
STEP_TOKENS = 7
LONGEST = 24  # prompt and answer
PAGE = 4
WINDOW = 6


class Machine(RuleBasedStateMachine):
    """The engine's calls in random order over a fake forward that checks where tokens are."""

    windows: tuple[int | None, ...] = (None,)

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(kv, "PAGE_TOKENS", PAGE)
        self.patch.setattr(slots, "LEAST_SHARED", 2)
        self.memory = self.make()
        self.scheduler = Scheduler(
            self.memory,
            max_sequences=MAX_SEQUENCES,
            max_queue=MAX_QUEUE,
            step_tokens=STEP_TOKENS,
        )
        self.kept = Kept(self.windows)
        self.now = 0.0
        self.numbers = 0
        self.added: dict[int, Sequence] = {}
        self.ended: dict[int, Sequence] = {}
        self.under_way: list[Batch] = []  # one step, or two: the second launched ahead

    def make(self) -> Memory:
        raise NotImplementedError

    @rule(
        family=st.integers(0, 1),
        common=st.integers(0, 15),
        own=st.integers(1, 5),
        max_tokens=st.integers(1, 4),
        count=st.integers(1, 3),
        owner=st.sampled_from("ab"),
        limit=st.none() | st.integers(1, 12),
    )
    def add(
        self,
        family: int,
        common: int,
        own: int,
        max_tokens: int,
        count: int,
        owner: str,
        limit: int | None,
    ) -> None:
        """One request: `count` answers to a prompt that begins like others."""
        prompt = (*range(100 * family, 100 * family + common), *range(900 - own, 900))
        deadline = None if limit is None else self.now + limit
        request: list[Sequence] = []
        for _ in range(count):
            leader = request[0] if request else None
            self.numbers += 1
            request.append(
                sequence(
                    prompt,
                    number=self.numbers,
                    max_tokens=max_tokens,
                    deadline=deadline,
                    owner=owner,
                    leader=leader,
                )
            )
        full = self.scheduler.waiting + self.scheduler.running + count > PLACES
        try:
            self.scheduler.add(tuple(request), step_s=0.1)
        except Overloaded:
            assert full
            return
        assert not full
        self.added.update((each.id, each) for each in request)

    @precondition(lambda self: not self.under_way)
    @rule(seconds=st.integers(0, 2), prefill=st.integers(1, STEP_TOKENS))
    def begin(self, seconds: int, prefill: int) -> None:
        self.now += seconds
        self.take_ended()
        batch = self.scheduler.next_batch(self.now, prefill)
        if batch is None:  # those that were dropped just now may hold the memory that others need
            self.take_ended()
            batch = self.scheduler.next_batch(self.now, prefill)
        if batch is None:
            assert not self.scheduler.has_sequences, "it waits for nothing"
            return
        assert batch.tokens <= max(STEP_TOKENS, len(batch.decodes))
        if batch.decodes:
            most = prefill * max(1, MAX_SEQUENCES // len(batch.decodes) - 1)
            assert batch.tokens - len(batch.decodes) <= most
        for piece in batch.pieces:
            each = piece.sequence
            assert each.outcome is None
            assert not each.stream.cancelled
            assert each.deadline is None or self.now < each.deadline
            assert piece.ids == each.ids(piece.start, piece.stop)
            assert piece.start == each.computed
            assert piece.samples == (piece.stop == each.known)
            self.kept.compute(piece)
        self.under_way.append(batch)

    @precondition(lambda self: len(self.under_way) == 1)
    @rule()
    def launch_ahead(self) -> None:
        after = self.scheduler.batch_after(self.under_way[0], self.now)
        if after is not None:
            assert len(after.decodes) == self.scheduler.running
            self.under_way.append(after)

    @precondition(lambda self: self.under_way)
    @rule(token=st.sampled_from([1, 2, STOP]), bad=st.none() | st.integers(0, 3))
    def finish(self, token: int, bad: int | None) -> None:
        batch = self.under_way.pop(0)
        for place, piece in enumerate(batch.pieces):
            each = piece.sequence
            if batch.follows and each.outcome is None:
                known = type(piece)(each, each.ids(piece.start, piece.stop), piece.start, True)
                self.kept.compute(known)
            if place == bad:
                self.scheduler.end(each, StepFailed("broken"))
                continue
            before = each.outcome
            delivered = self.scheduler.record(piece, token if piece.samples else None)
            wanted = before is None and piece.samples and token != STOP
            assert delivered == wanted

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        self.added[data.draw(st.sampled_from(sorted(self.added)))].stream.cancel()

    @precondition(lambda self: not self.under_way)
    @rule()
    def take_ended(self) -> None:
        while (each := self.scheduler.take_ended()) is not None:
            assert each.id not in self.ended, "ended twice"
            assert each.outcome is not None
            assert each.hold is None
            self.ended[each.id] = each

    @rule()
    def stop(self) -> None:
        self.scheduler.end_all(EngineStopped("stopping"))
        assert not self.scheduler.has_sequences

    @invariant()
    def the_limits_hold(self) -> None:
        assert self.scheduler.running <= MAX_SEQUENCES
        assert self.scheduler.waiting + self.scheduler.running <= PLACES

    @invariant()
    def nothing_is_lost(self) -> None:
        here = self.scheduler.running + self.scheduler.waiting
        assert here == sum(each.outcome is None for each in self.added.values())

    @invariant()
    def memory_is_counted_right(self) -> None:
        holders = [each for each in self.added.values() if each.hold is not None]
        if isinstance(self.memory, Pages):
            for index, pool in enumerate(self.memory._pools):
                tables = [
                    set(each.hold.tables[index])
                    for each in holders
                    if isinstance(each.hold, PageHold)
                ]
                users = [sum(page in table for table in tables) for page in range(pool.total)]
                assert pool.users == users
                idle = [*pool.free, *pool.cached]
                assert sorted(idle) == [page for page, count in enumerate(users) if not count]
        else:
            places = [each.hold.slot for each in holders if isinstance(each.hold, SlotHold)]
            assert len(set(places)) == len(places) == len(holders)
        if not holders:
            assert self.memory.used_tokens == 0

    def teardown(self) -> None:
        """Whatever happened before, everything that was added comes to its end."""
        try:
            while self.under_way:
                self.finish(1, None)
            steps = 0
            while self.scheduler.has_work:
                self.begin(0, 1)
                while self.under_way:
                    self.finish(1, None)
                self.take_ended()
                steps += 1
                assert steps < 2000, "no progress"
            assert self.ended.keys() == self.added.keys()
            assert self.memory.used_tokens == 0
            for each in self.ended.values():
                if each.outcome == "length":
                    assert each.tokens_left == 0
        finally:
            self.patch.undo()


class OverSlots(Machine):
    def make(self) -> Memory:
        return Slots(MAX_SEQUENCES, share=True)


class OverFewSlots(Machine):
    def make(self) -> Memory:
        return Slots(MAX_SEQUENCES - 1, share=False)


class OverPages(Machine):
    """Hardly more than one sequence needs, so that others give way."""

    def make(self) -> Memory:
        return Pages([Group(kv.pages(LONGEST) + 2)])


class OverRings(Machine):
    windows = (None, WINDOW)

    def make(self) -> Memory:
        ring = kv.pages(WINDOW + STEP_TOKENS) + 1
        return Pages([Group(kv.pages(LONGEST) + 4), Group(ring + 3, ring=ring)])


QUICK = settings(max_examples=40, stateful_step_count=40, deadline=None, database=None)
TestOverSlots = OverSlots.TestCase
TestOverSlots.settings = QUICK
TestOverFewSlots = OverFewSlots.TestCase
TestOverFewSlots.settings = QUICK
TestOverPages = OverPages.TestCase
TestOverPages.settings = QUICK
TestOverRings = OverRings.TestCase
TestOverRings.settings = QUICK
