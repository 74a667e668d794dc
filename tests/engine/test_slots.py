"""Slots: one sequence each; a beginning that is somewhere already is copied or gone on from."""

import pytest

from service.engine.sequence import Sequence
from service.engine.slots import LEAST_SHARED
from service.engine.slots import SlotHold
from service.engine.slots import Slots
from tests.engine.sequences import compute
from tests.engine.sequences import finished
from tests.engine.sequences import sequence

LONG = 4 * LEAST_SHARED


def slots(count: int = 3, *, share: bool = True) -> Slots:
    return Slots(count, share=share)


def hold(one: Sequence) -> SlotHold:
    assert isinstance(one.hold, SlotHold)
    return one.hold


def others(first: int, length: int) -> range:
    return range(first, first + length)


def test_every_sequence_has_a_slot_of_its_own_and_gives_it_back() -> None:
    three = slots()
    held = [sequence(others(100 * n, 5)) for n in range(3)]
    assert all(three.admit(one) for one in held)
    assert {hold(one).slot for one in held} == {0, 1, 2}
    assert not three.admit(sequence(5))
    three.free(held[1])
    three.free(held[1])
    assert three.admit(sequence(5))


def test_tokens_are_counted_as_they_are_computed() -> None:
    two = slots()
    one = sequence(10)
    two.admit(one)
    assert two.used_tokens == 0
    compute(two, one, 6)
    assert two.used_tokens == 6
    two.free(one)
    assert two.used_tokens == 0


def test_a_slot_has_room_for_the_whole_context() -> None:
    one = sequence(10)
    two = slots()
    two.admit(one)
    assert two.grow(one, 1000)


def test_a_turn_of_a_talk_goes_on_in_the_slot_of_the_turn_before() -> None:
    three = slots()
    first = sequence(LONG)
    three.admit(first)
    place = hold(first).slot
    first.generated += [7, 8, 9]
    compute(three, first, LONG + 2)  # the last token chosen is never computed
    three.free(first)
    turn = sequence((*range(LONG), 7, 8, 9, 10, 11))
    assert three.admit(turn)
    assert (hold(turn).slot, hold(turn).copy_from) == (place, None)
    assert turn.computed == LONG + 2
    assert three.prefix_tokens == LONG + 2


def test_the_beginning_of_a_running_sequence_is_copied() -> None:
    three = slots()
    running, new = sequence(LONG), sequence((*range(LONG - 8), *others(500, 20)))
    three.admit(running)
    compute(three, running)
    assert three.admit(new)
    assert hold(new).slot != hold(running).slot
    assert (hold(new).copy_from, hold(new).copied) == (hold(running).slot, LONG - 8)
    assert new.computed == LONG - 8


def test_only_what_a_running_sequence_has_computed_is_copied() -> None:
    three = slots()
    running, new = sequence(LONG), sequence(LONG)
    three.admit(running)
    compute(three, running, LEAST_SHARED + 3)
    three.admit(new)
    assert new.computed == LEAST_SHARED + 3


def test_the_last_token_of_a_prompt_is_always_computed_because_its_logits_are_wanted() -> None:
    three = slots()
    finished(three, sequence(LONG))
    again = sequence(LONG)
    three.admit(again)
    assert again.computed == LONG - 1


def test_the_longest_beginning_is_taken() -> None:
    three = slots()
    finished(three, sequence((*range(LEAST_SHARED + 4), *others(300, 9))))
    three.admit(longer := sequence((*range(LONG), *others(400, 9))))
    compute(three, longer)
    three.admit(new := sequence((*range(LONG), *others(600, 9))))
    assert new.computed == LONG
    assert hold(new).copy_from == hold(longer).slot


@pytest.mark.parametrize(
    ("common", "computed"), [(LEAST_SHARED - 1, 0), (LEAST_SHARED, LEAST_SHARED)]
)
def test_a_short_beginning_is_not_worth_it(common: int, computed: int) -> None:
    three = slots()
    finished(three, sequence((*range(common), *others(300, 90))))
    three.admit(new := sequence((*range(common), *others(600, 9))))
    assert new.computed == computed


def test_content_stays_as_long_as_there_are_slots_without() -> None:
    three = slots()
    finished(three, sequence(others(0, LONG)))
    finished(three, sequence(others(1000, LONG)))
    finished(three, sequence(others(2000, LONG)))
    for first in (0, 1000, 2000):
        one = sequence(others(first, LONG))
        three.admit(one)
        assert one.computed == LONG - 1
        three.free(one)


def test_the_content_left_longest_ago_goes_first() -> None:
    two = slots(2)
    finished(two, sequence(others(0, LONG)))
    finished(two, sequence(others(1000, LONG)))
    finished(two, sequence(others(0, LONG)))
    finished(two, sequence(others(2000, LONG)))  # in the place of 1000
    kept, gone = sequence(others(0, LONG)), sequence(others(1000, LONG))
    two.admit(kept)
    two.admit(gone)
    assert (kept.computed, gone.computed) == (LONG - 1, 0)


def test_a_failed_sequence_leaves_nothing_to_be_found() -> None:
    three = slots()
    sick = sequence(LONG)
    three.admit(sick)
    compute(three, sick)
    three.free(sick, failed=True)
    again = sequence(LONG)
    three.admit(again)
    assert again.computed == 0


def test_where_a_layer_forgets_tokens_nothing_is_shared() -> None:
    three = slots(share=False)
    finished(three, sequence(LONG))
    three.admit(running := sequence(LONG))
    compute(three, running)
    three.admit(again := sequence(LONG))
    assert (again.computed, three.prefix_tokens) == (0, 0)


def test_two_that_come_at_once_go_on_from_the_same_content() -> None:
    three = slots()
    finished(three, sequence(LONG))
    first, second = sequence((*range(LONG), 500)), sequence((*range(LONG), 600))
    three.admit(first)
    three.admit(second)
    assert hold(first).copy_from is None
    assert (hold(second).copy_from, hold(second).copied) == (hold(first).slot, LONG)


def test_what_one_owner_said_is_not_found_by_another_whether_it_runs_or_has_ended() -> None:
    """Else a client could tell by the time of an answer what somebody else asked."""
    three = slots()
    running = sequence(LONG, owner="alice")
    three.admit(running)
    compute(three, running)
    finished(three, sequence(LONG, owner="alice"))
    other = sequence(LONG, owner="bob")
    assert three.admit(other)
    assert other.computed == 0
