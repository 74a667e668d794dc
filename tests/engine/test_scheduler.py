"""Who runs next, without threads, model or clock."""

import pytest

from service.engine.pages import Group
from service.engine.pages import Pages
from service.engine.scheduler import Batch
from service.engine.scheduler import Scheduler
from service.engine.sequence import MOST_UNREAD
from service.engine.sequence import Sequence
from service.engine.slots import Slots
from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.errors import InvalidRequest
from service.errors import Overloaded
from service.errors import ReadTooSlowly
from service.errors import StepFailed
from service.placement.kv import PAGE_TOKENS
from tests.engine.sequences import STOP
from tests.engine.sequences import sequence

UNBOUNDED = 10**6


def scheduler(
    *,
    max_sequences: int = 2,
    max_queue: int = 8,
    step_tokens: int = 8,
    pages: int | None = None,
    score_tokens: int = 0,
) -> Scheduler:
    memory = Slots(max_sequences, share=True) if pages is None else Pages([Group(pages)])
    return Scheduler(
        memory,
        max_sequences=max_sequences,
        max_queue=max_queue,
        step_tokens=step_tokens,
        score_tokens=score_tokens,
    )


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for one in sequences:
        scheduler.add((one,), step_s=0.0)


def advance(
    scheduler: Scheduler, token: int = 7, now: float = 0.0, prefill: int = UNBOUNDED
) -> Batch | None:
    """One step as the engine does it."""
    batch = scheduler.next_batch(now, prefill)
    if batch is not None:
        for piece in batch.pieces:
            scheduler.record(piece, token if piece.samples else None)
    return batch


def shape(batch: Batch | None) -> tuple[list[int], list[tuple[int, int, bool]]]:
    """Ids that decode; ids that prefill, with how many tokens, and whether they sample."""
    assert batch is not None
    return (
        [piece.sequence.id for piece in batch.decodes],
        [(piece.sequence.id, len(piece.ids), piece.samples) for piece in batch.prefills],
    )


def taken(scheduler: Scheduler) -> list[Sequence]:
    ended = []
    while (one := scheduler.take_ended()) is not None:
        ended.append(one)
    return ended


def one(number: int, prompt: int = 1, **settings: object) -> Sequence:
    """A sequence whose prompt begins like no other's."""
    ids = range(100 * number, 100 * number + prompt)
    return sequence(ids, number=number, **settings)  # type: ignore[arg-type]


# --- steps


def test_nothing_added_means_no_step() -> None:
    idle = scheduler()
    assert idle.next_batch(0.0, UNBOUNDED) is None
    assert not idle.has_work


def test_a_prompt_is_computed_in_pieces_and_only_the_last_samples() -> None:
    single = scheduler(step_tokens=4)
    add(single, sequence(10, max_tokens=2))
    steps = [piece for _ in range(4) for piece in (advance(single) or Batch()).pieces]
    assert [(piece.start, piece.ids, piece.samples) for piece in steps] == [
        (0, (0, 1, 2, 3), False),
        (4, (4, 5, 6, 7), False),
        (8, (8, 9), True),
        (10, (7,), True),
    ]
    assert [ended.outcome for ended in taken(single)] == ["length"]


def test_running_sequences_go_on_in_every_step_beside_the_pieces_of_a_long_prompt() -> None:
    both = scheduler(step_tokens=8)
    add(both, one(0, max_tokens=9), one(1, prompt=20))
    assert shape(advance(both)) == ([], [(0, 1, True), (1, 7, False)])
    assert shape(advance(both)) == ([0], [(1, 7, False)])
    assert shape(advance(both)) == ([0], [(1, 6, True)])
    assert shape(advance(both)) == ([0, 1], [])


def test_a_step_never_computes_more_tokens_than_it_may() -> None:
    many = scheduler(max_sequences=5, step_tokens=8)
    add(many, *(one(number, prompt=11) for number in range(5)))
    sizes = []
    while (batch := advance(many)) is not None:
        sizes.append(batch.tokens)
    assert max(sizes) == 8


def test_beside_running_sequences_only_so_many_tokens_of_prompts_are_computed() -> None:
    both = scheduler(step_tokens=64)
    add(both, one(0, max_tokens=50))
    advance(both)
    add(both, one(1, prompt=10))
    assert shape(advance(both, prefill=4)) == ([0], [(1, 4, False)])
    assert shape(advance(both, prefill=4)) == ([0], [(1, 4, False)])
    assert shape(advance(both, prefill=4)) == ([0], [(1, 2, True)])


def test_the_more_wait_for_their_first_token_the_more_of_prompts_is_computed() -> None:
    busy = scheduler(max_sequences=5, step_tokens=64)
    add(busy, one(0, max_tokens=50))
    advance(busy)
    add(busy, *(one(number, prompt=50) for number in range(1, 9)))
    # four can run beside it; the others that wait are not for this step
    assert shape(advance(busy, prefill=4)) == ([0], [(1, 16, False)])


def test_with_nobody_running_the_whole_step_is_for_prompts() -> None:
    alone = scheduler(step_tokens=64)
    add(alone, one(0, prompt=40))
    assert shape(advance(alone, prefill=4)) == ([], [(0, 40, True)])


def test_several_prompts_fill_one_step_in_the_order_they_came() -> None:
    three = scheduler(max_sequences=3, step_tokens=10)
    add(three, one(0, prompt=3), one(1, prompt=4), one(2, prompt=5))
    assert shape(advance(three)) == ([], [(0, 3, True), (1, 4, True), (2, 3, False)])


def test_nobody_is_admitted_before_a_step_has_room_for_it() -> None:
    two = scheduler(step_tokens=4)
    add(two, one(0, prompt=8), one(1))
    advance(two)
    assert (two.running, two.waiting) == (1, 1)


# --- admission


def test_waiting_sequences_are_admitted_in_order_as_places_come_free() -> None:
    busy = scheduler(max_sequences=2)
    add(busy, *(one(number, max_tokens=1 + number % 2) for number in range(4)))
    order = []
    while (batch := advance(busy)) is not None:
        order.append([piece.sequence.id for piece in batch.pieces])
        taken(busy)
    assert order == [[0, 1], [1, 2], [3], [3]]
    assert (busy.running, busy.waiting) == (0, 0)


def test_owners_take_turns_when_there_is_a_queue() -> None:
    shared = scheduler(max_sequences=2)
    add(shared, *(one(number, owner="greedy") for number in range(4)), one(4, owner="modest"))
    assert shape(advance(shared)) == ([], [(0, 1, True), (4, 1, True)])


def test_among_owners_with_as_many_running_the_first_that_came_is_first() -> None:
    shared = scheduler(max_sequences=1)
    add(shared, one(0, owner="b", max_tokens=1), one(1, owner="a", max_tokens=1), one(2, owner="b"))
    order = []
    for _ in range(3):
        order += [piece.sequence.id for piece in (advance(shared) or Batch()).pieces]
        taken(shared)
    assert order == [0, 1, 2]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    full = scheduler(max_sequences=1, max_queue=1)
    full.add((one(0, max_tokens=10),), step_s=0.5)
    full.add((one(1),), step_s=0.5)
    full.next_batch(0.0, UNBOUNDED)
    with pytest.raises(Overloaded, match="1 sequences are running and 1 are waiting") as refused:
        full.add((one(2),), step_s=0.5)
    # one step for the prompt and ten tokens of half a second each: 5.5 s
    assert refused.value.retry_after_s == 6


@pytest.mark.parametrize(("step_s", "retry_after_s"), [(0.0, 1), (1000.0, 60)])
def test_the_time_to_come_back_has_bounds(step_s: float, retry_after_s: int) -> None:
    full = scheduler(max_sequences=1, max_queue=0)
    full.add((one(0),), step_s=step_s)
    with pytest.raises(Overloaded) as refused:
        full.add((one(1),), step_s=step_s)
    assert refused.value.retry_after_s == retry_after_s


def test_a_request_of_several_is_taken_whole_or_not_at_all() -> None:
    full = scheduler(max_sequences=1, max_queue=2)
    full.add((one(0), one(1)), step_s=0.0)
    with pytest.raises(Overloaded):
        full.add((one(2), one(3)), step_s=0.0)
    assert full.waiting == 2
    full.add((one(4),), step_s=0.0)


def test_a_request_of_more_than_could_ever_find_a_place_is_told_so() -> None:
    small = scheduler(max_sequences=1, max_queue=2)
    with pytest.raises(InvalidRequest, match="4 answers were asked for; this server takes 3"):
        small.add(tuple(map(one, range(4))), step_s=0.0)


def test_a_queue_of_zero_still_lets_sequences_run() -> None:
    direct = scheduler(max_sequences=2, max_queue=0)
    add(direct, one(0), one(1))
    advance(direct)
    assert direct.running == 2


@pytest.mark.parametrize(
    ("name", "value"), [("max_sequences", 0), ("max_queue", -1), ("step_tokens", 0)]
)
def test_impossible_settings_are_named(name: str, value: int) -> None:
    settings = {"max_sequences": 1, "max_queue": 1, "step_tokens": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; give"):
        Scheduler(Slots(1, share=True), **settings)


# --- several answers to one prompt


def answers(count: int, prompt: int) -> list[Sequence]:
    leader = sequence(prompt, number=0)
    return [leader, *(sequence(prompt, number=n, leader=leader) for n in range(1, count))]


@pytest.mark.parametrize("pages", [None, 30])
def test_the_prompt_of_several_answers_is_computed_once(pages: int | None) -> None:
    three = scheduler(max_sequences=3, step_tokens=100, pages=pages)
    prompt = 2 * PAGE_TOKENS + 1
    three.add(tuple(answers(3, prompt)), step_s=0.0)
    assert shape(advance(three)) == ([], [(0, 100, False)])
    assert shape(advance(three)) == ([], [(0, prompt - 100, True)])
    assert shape(advance(three)) == ([0], [(1, 1, True), (2, 1, True)])


def test_who_shares_a_prompt_lets_others_go_before_until_it_is_computed() -> None:
    three = scheduler(max_sequences=3, step_tokens=50)
    three.add(tuple(answers(2, 60)), step_s=0.0)
    add(three, one(2))
    assert shape(advance(three)) == ([], [(0, 50, False)])
    assert shape(advance(three)) == ([], [(0, 10, True), (2, 1, True)])
    assert shape(advance(three)) == ([0, 2], [(1, 1, True)])


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_when_the_first_of_several_ends_early_the_others_are_answered(end: str) -> None:
    two = scheduler(step_tokens=4)
    first, second = answers(2, 6)
    two.add((first, second), step_s=0.0)
    advance(two)
    if end == "cancelled":
        first.stream.cancel()
    else:
        two.end(first, StepFailed("broken"))
    for _ in range(20):
        advance(two)
        taken(two)
    assert second.outcome == "length"


# --- ends


def test_a_stop_token_ends_the_sequence_and_is_not_delivered() -> None:
    single = scheduler()
    add(single, one(0))
    batch = single.next_batch(0.0, UNBOUNDED)
    assert batch is not None
    assert single.record(batch.pieces[0], STOP) is False
    (ended,) = taken(single)
    assert (ended.outcome, ended.generated) == ("stop", [])


def test_the_last_allowed_token_is_delivered() -> None:
    single = scheduler()
    add(single, one(0, max_tokens=1))
    batch = single.next_batch(0.0, UNBOUNDED)
    assert batch is not None
    assert single.record(batch.pieces[0], 5) is True
    assert [ended.outcome for ended in taken(single)] == ["length"]


def test_cancelled_sequences_are_dropped_before_the_next_step_wherever_they_are() -> None:
    both = scheduler(max_sequences=1)
    running, waiting = one(0), one(1)
    add(both, running, waiting)
    advance(both)
    running.stream.cancel()
    waiting.stream.cancel()
    assert both.next_batch(0.0, UNBOUNDED) is None
    assert [ended.outcome for ended in taken(both)] == ["cancelled", "cancelled"]


def test_deadlines_end_the_running_and_the_waiting() -> None:
    both = scheduler(max_sequences=1)
    add(both, one(0, deadline=5.0), one(1, deadline=4.0), one(2))
    assert shape(both.next_batch(3.9, UNBOUNDED)) == ([], [(0, 1, True)])
    assert shape(both.next_batch(4.0, UNBOUNDED)) == ([], [(0, 1, True)])
    (late,) = taken(both)
    assert late.id == 1
    assert isinstance(late.outcome, DeadlineExceeded)
    both.next_batch(5.0, UNBOUNDED)
    assert [ended.id for ended in taken(both)] == [0]
    assert shape(both.next_batch(5.0, UNBOUNDED)) == ([], [(2, 1, True)])


def test_a_client_that_does_not_read_loses_its_sequence_and_nobody_else_does() -> None:
    both = scheduler(step_tokens=8)
    slow, fast = one(0, max_tokens=10**5), one(1, max_tokens=10**5)
    add(both, slow, fast)
    advance(both)
    for token in range(MOST_UNREAD):
        slow.stream.put(token)
    assert shape(advance(both)) == ([0, 1], [])
    slow.stream.put(1)
    assert shape(advance(both)) == ([1], [])
    (ended,) = taken(both)
    assert isinstance(ended.outcome, ReadTooSlowly)
    ended.close_stream()
    assert len(slow.stream.read()) == MOST_UNREAD + 1
    with pytest.raises(ReadTooSlowly, match=f"{MOST_UNREAD} tokens unread"):
        slow.stream.read()


def test_a_sequence_that_ended_during_its_step_keeps_that_end() -> None:
    single = scheduler()
    add(single, one(0, max_tokens=1))
    batch = single.next_batch(0.0, UNBOUNDED)
    assert batch is not None
    error = EngineStopped("closing")
    assert [ended.outcome for ended in single.end_all(error)] == [error]
    assert single.record(batch.pieces[0], 5) is False
    single.end(batch.pieces[0].sequence, "stop")
    assert [ended.outcome for ended in taken(single)] == [error]


def test_memory_that_cannot_be_freed_leaves_the_sequence_to_those_who_end_all() -> None:
    class Stuck(Slots):
        def free(self, sequence: Sequence, *, failed: bool = False) -> None:
            raise MemoryError

    stuck = Scheduler(Stuck(1, share=True), max_sequences=1, max_queue=1, step_tokens=8)
    add(stuck, last := one(0, max_tokens=1))
    advance(stuck)
    with pytest.raises(MemoryError):
        stuck.take_ended()
    assert stuck.end_all(EngineStopped("died")) == (last,)


# --- memory


def test_when_pages_run_out_the_newest_gives_way_and_is_the_first_to_come_back() -> None:
    small = scheduler(max_sequences=3, step_tokens=300, pages=4)
    old, new = one(0, prompt=60, max_tokens=80), one(1, prompt=60, max_tokens=80)
    add(small, old, new)
    while not small.preemptions:
        advance(small)
    assert (small.running, small.waiting) == (1, 1)
    add(small, late := one(2, prompt=1))
    while new.hold is None:
        advance(small)
        taken(small)
        assert new.hold is not None or late.hold is None, "who came later went before"
    while small.has_work:
        advance(small)
        taken(small)
    assert [each.outcome for each in (old, new, late)] == ["length"] * 3
    assert len(new.generated) == 80
    assert small.memory.used_tokens == 0


def test_a_sequence_that_gave_way_is_computed_again_with_the_tokens_it_had() -> None:
    small = scheduler(max_sequences=2, step_tokens=300, pages=4)
    old, new = one(0, prompt=60, max_tokens=80), one(1, prompt=60, max_tokens=80)
    add(small, old, new)
    while not small.preemptions:
        advance(small)
    known = new.ids(0, new.known)
    while new.hold is None:
        batch = advance(small)
        taken(small)
    assert batch is not None
    piece = next(piece for piece in batch.prefills if piece.sequence is new)
    assert known[: piece.start] + piece.ids == known
    assert piece.samples


def test_a_stream_knows_when_it_first_left_the_queue() -> None:
    small = scheduler(max_sequences=1)
    first, second = one(0, max_tokens=2), one(1)
    add(small, first, second)
    for now in (5.0, 6.0, 7.0):
        advance(small, now=now)
        taken(small)
    assert (first.stream.admitted_at, second.stream.admitted_at) == (5.0, 7.0)


def test_a_preempted_sequence_can_be_cancelled_while_it_waits() -> None:
    small = scheduler(max_sequences=2, step_tokens=300, pages=4)
    old, new = one(0, prompt=60, max_tokens=80), one(1, prompt=60, max_tokens=80)
    add(small, old, new)
    while not small.preemptions:
        advance(small)
    new.stream.cancel()
    advance(small)
    assert taken(small) == [new]
    assert new.outcome == "cancelled"


def test_nobody_gives_way_where_there_is_memory_for_all() -> None:
    large = scheduler(max_sequences=2, step_tokens=300, pages=6)
    add(large, one(0, prompt=60, max_tokens=80), one(1, prompt=60, max_tokens=80))
    while large.has_work:
        advance(large)
        taken(large)
    assert large.preemptions == 0


# --- the step after one whose tokens are not known


def decoding(count: int = 2, **settings: object) -> tuple[Scheduler, Batch]:
    """A scheduler in the middle of a step that only continues sequences."""
    busy = scheduler(max_sequences=4, step_tokens=300, pages=8)
    add(busy, *(one(number, **{"max_tokens": 4, **settings}) for number in range(count)))
    advance(busy)
    batch = busy.next_batch(0.0, UNBOUNDED)
    assert batch is not None
    return busy, batch


def test_the_next_step_of_the_same_sequences_is_known_before_their_tokens_are() -> None:
    busy, batch = decoding()
    after = busy.batch_after(batch, 0.0)
    assert after is not None
    assert after.follows
    assert after.prefills == ()
    assert [piece.sequence for piece in after.decodes] == [p.sequence for p in batch.decodes]
    assert [(piece.start, piece.ids) for piece in after.decodes] == [(2, ()), (2, ())]
    for piece in (*batch.pieces, *after.pieces):
        busy.record(piece, 7)
    assert [piece.sequence.computed for piece in after.decodes] == [3, 3]
    assert shape(busy.next_batch(0.0, UNBOUNDED)) == ([0, 1], [])


def test_no_step_is_taken_for_known_when_somebody_waits_to_be_admitted() -> None:
    busy, batch = decoding()
    add(busy, one(5))
    assert busy.batch_after(batch, 0.0) is None


def test_no_step_is_taken_for_known_beside_a_prompt() -> None:
    busy = scheduler(max_sequences=4, step_tokens=300, pages=8)
    add(busy, one(0, prompt=5))
    batch = busy.next_batch(0.0, UNBOUNDED)
    assert batch is not None
    assert busy.batch_after(batch, 0.0) is None


def test_no_step_is_taken_for_known_when_an_answer_reaches_its_last_token() -> None:
    busy, batch = decoding(max_tokens=2)
    assert busy.batch_after(batch, 0.0) is None


def test_no_step_is_taken_for_known_when_a_client_has_left_or_time_is_up() -> None:
    busy, batch = decoding(deadline=9.0)
    assert busy.batch_after(batch, 9.0) is None
    assert busy.batch_after(batch, 8.0) is not None
    batch.decodes[0].sequence.stream.cancel()
    assert busy.batch_after(batch, 8.0) is None


def test_no_step_is_taken_for_known_when_one_has_ended_and_is_not_taken_yet() -> None:
    busy, batch = decoding()
    busy.end(batch.decodes[0].sequence, StepFailed("broken"))
    assert busy.batch_after(batch, 0.0) is None


def test_no_step_is_taken_for_known_when_pages_run_out() -> None:
    busy = scheduler(max_sequences=2, step_tokens=300, pages=2)
    first, second = one(0, prompt=63, max_tokens=9), one(1, prompt=63, max_tokens=9)
    add(busy, first)
    advance(busy)
    add(busy, second)
    advance(busy)
    assert busy.running + busy.waiting == 2
    while busy.running == 2:
        batch = busy.next_batch(0.0, UNBOUNDED)
        assert batch is not None
        if first.known + 1 > PAGE_TOKENS:
            assert busy.batch_after(batch, 0.0) is None
            return
        for piece in batch.pieces:
            busy.record(piece, 7)
    batch = busy.next_batch(0.0, UNBOUNDED)
    assert batch is not None
    assert busy.batch_after(batch, 0.0) is None  # the other one waits


def test_a_token_that_ends_an_answer_makes_the_step_after_it_idle_for_that_one() -> None:
    busy, batch = decoding()
    after = busy.batch_after(batch, 0.0)
    assert after is not None
    busy.record(batch.decodes[0], STOP)
    busy.record(batch.decodes[1], 7)
    assert [each.outcome for each in taken(busy)] == ["stop"]
    assert busy.record(after.decodes[0], 7) is False
    assert busy.record(after.decodes[1], 7) is True
    assert busy.memory.used_tokens == PAGE_TOKENS


# --- prompts whose logprobs are wanted


def test_scored_prompts_share_a_budget_of_their_own_and_others_are_not_held_up():
    made = scheduler(max_sequences=3, step_tokens=20, score_tokens=4)
    add(made, sequence(6, number=0, prompt_logprobs=0), sequence(3, number=1, prompt_logprobs=1))
    add(made, sequence(9, number=2))
    assert shape(advance(made)) == ([], [(0, 4, False), (2, 9, True)])
    assert shape(advance(made)) == ([2], [(0, 2, True), (1, 2, False)])
    assert shape(advance(made)) == ([0, 2], [(1, 1, True)])


@pytest.mark.parametrize("pages", [None, 20])
def test_a_scored_prompt_does_not_begin_with_what_others_computed(pages):
    made = scheduler(step_tokens=500, score_tokens=500, pages=pages)
    first, again = sequence(200, max_tokens=1), sequence(200, max_tokens=1)
    scored = sequence(200, max_tokens=1, prompt_logprobs=0)
    for one in (first, again, scored):
        add(made, one)
        advance(made)
        made.take_ended()
    assert first.stream.cached_tokens == scored.stream.cached_tokens == 0
    assert again.stream.cached_tokens == (
        199 if pages is None else 200 // PAGE_TOKENS * PAGE_TOKENS
    )


@pytest.mark.parametrize("token", [7, STOP])
def test_a_prompt_that_is_only_scored_ends_without_a_token(token):
    made = scheduler(step_tokens=500, score_tokens=500)
    only = sequence(20, max_tokens=0, prompt_logprobs=0)
    add(made, only)
    advance(made, token=token)
    assert made.take_ended() is only
    assert (only.outcome, only.generated) == ("length", [])


def test_where_no_prompt_can_be_scored_none_is_taken():
    made = scheduler(score_tokens=0)
    with pytest.raises(InvalidRequest, match="no logprobs of a prompt") as error:
        add(made, sequence(5, prompt_logprobs=0))
    assert error.value.param == "echo"
    assert not made.has_sequences
