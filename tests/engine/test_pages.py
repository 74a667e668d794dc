"""Pages: allocated, shared by prefix, given back. No tensors."""

import pytest

from service.engine.pages import Group
from service.engine.pages import PageHold
from service.engine.pages import Pages
from service.engine.sequence import Sequence
from service.placement.kv import PAGE_TOKENS
from tests.engine.sequences import compute
from tests.engine.sequences import finished
from tests.engine.sequences import sequence

PAGE = PAGE_TOKENS


def table(one: Sequence, group: int = 0) -> list[int]:
    assert isinstance(one.hold, PageHold)
    return one.hold.tables[group]


def others(first: int, length: int) -> range:
    return range(first, first + length)


def test_a_sequence_gets_the_pages_its_tokens_lie_on_and_gives_them_back() -> None:
    pages = Pages([Group(4)])
    one = sequence(2 * PAGE + 1)
    assert pages.admit(one)
    assert len(set(table(one))) == 3
    assert pages.used_tokens == 3 * PAGE
    pages.free(one)
    pages.free(one)
    assert one.hold is None
    assert pages.used_tokens == 0


def test_a_page_more_is_taken_when_the_last_is_full_and_not_before() -> None:
    pages = Pages([Group(2)])
    one = sequence(PAGE, max_tokens=PAGE)
    assert pages.admit(one)
    assert pages.grow(one, PAGE)
    assert len(table(one)) == 1
    assert pages.grow(one, PAGE + 1)
    assert len(table(one)) == 2
    assert pages.grow(one, 2 * PAGE)
    assert not pages.grow(one, 2 * PAGE + 1)
    assert len(table(one)) == 2


def test_what_does_not_fit_takes_nothing() -> None:
    pages = Pages([Group(3)])
    assert not pages.admit(sequence(3 * PAGE + 1))
    assert pages.used_tokens == 0
    assert pages.admit(sequence(3 * PAGE))


def test_two_running_sequences_never_have_a_page_in_common_that_is_not_full() -> None:
    pages = Pages([Group(6)])
    first, second = sequence(PAGE + 10), sequence(PAGE + 10)
    assert pages.admit(first)
    compute(pages, first)
    assert pages.admit(second)
    assert table(first)[0] == table(second)[0]
    assert table(first)[1] != table(second)[1]


def test_a_prompt_that_begins_like_an_earlier_one_is_found_computed_in_whole_pages() -> None:
    pages = Pages([Group(8)])
    finished(pages, sequence(3 * PAGE + 5))
    again = sequence((*range(2 * PAGE), *others(5000, 40)))
    assert pages.admit(again)
    assert again.computed == 2 * PAGE
    assert pages.prefix_tokens == 2 * PAGE


def test_the_last_token_of_a_prompt_is_always_computed_because_its_logits_are_wanted() -> None:
    pages = Pages([Group(8)])
    finished(pages, sequence(2 * PAGE))
    again = sequence(2 * PAGE)
    assert pages.admit(again)
    assert again.computed == PAGE


def test_equal_pages_after_unequal_ones_are_not_shared() -> None:
    pages = Pages([Group(8)])
    finished(pages, sequence((*others(0, PAGE), *others(1000, PAGE), 1)))
    other = sequence((*others(2000, PAGE), *others(1000, PAGE), 1))
    assert pages.admit(other)
    assert other.computed == 0


def test_tokens_of_an_answer_are_found_like_those_of_a_prompt() -> None:
    pages = Pages([Group(8)])
    talk = sequence(PAGE - 2, max_tokens=PAGE)
    assert pages.admit(talk)
    talk.generated += [7, 8, 9]
    assert pages.grow(talk, talk.known)
    compute(pages, talk)
    pages.free(talk)
    turn = sequence((*range(PAGE - 2), 7, 8, 9, 10))
    assert pages.admit(turn)
    assert turn.computed == PAGE


def test_pages_that_are_not_computed_yet_are_not_found() -> None:
    pages = Pages([Group(8)])
    first, second = sequence(2 * PAGE + 1), sequence(2 * PAGE + 1)
    assert pages.admit(first)
    compute(pages, first, PAGE - 1)
    assert pages.admit(second)
    assert second.computed == 0


def test_shared_pages_are_used_until_the_last_one_leaves() -> None:
    pages = Pages([Group(4)])
    first, second = sequence(2 * PAGE + 1), sequence(2 * PAGE + 1)
    assert pages.admit(first)
    compute(pages, first)
    assert pages.admit(second)
    assert pages.used_tokens == 4 * PAGE
    pages.free(first)
    assert pages.used_tokens == 3 * PAGE
    # the two that are shared are not free for others
    assert not pages.admit(sequence(others(9000, PAGE + 1)))
    pages.free(second)
    assert pages.used_tokens == 0
    assert pages.admit(sequence(others(9000, 3 * PAGE + 1)))


def test_the_content_left_longest_ago_goes_first_and_its_ends_before_its_beginning() -> None:
    pages = Pages([Group(6)])
    finished(pages, sequence(others(0, 2 * PAGE + 1)))
    finished(pages, sequence(others(1000, 2 * PAGE + 1)))
    # two free ones, one with content
    taker = sequence(others(5000, 3 * PAGE))
    assert pages.admit(taker)
    pages.free(taker, failed=True)
    newer, older = sequence(others(1000, 2 * PAGE + 1)), sequence(others(0, 2 * PAGE + 1))
    assert pages.admit(newer)
    assert newer.computed == 2 * PAGE
    pages.free(newer)
    assert pages.admit(older)
    assert older.computed == PAGE


def test_using_content_again_makes_it_the_newest() -> None:
    pages = Pages([Group(6)])
    finished(pages, sequence(others(0, PAGE + 1)))
    finished(pages, sequence(others(1000, PAGE + 1)))
    finished(pages, sequence(others(0, PAGE + 1)))
    taker = sequence(others(5000, 5 * PAGE))
    assert pages.admit(taker)
    pages.free(taker, failed=True)
    again = sequence(others(0, PAGE + 1))
    assert pages.admit(again)
    assert again.computed == PAGE


def test_a_failed_sequence_leaves_nothing_to_be_found() -> None:
    pages = Pages([Group(8)])
    sick = sequence(3 * PAGE)
    assert pages.admit(sick)
    compute(pages, sick)
    pages.free(sick, failed=True)
    again = sequence(3 * PAGE)
    assert pages.admit(again)
    assert again.computed == 0


def test_pages_that_a_failed_sequence_shared_stay_with_those_who_use_them() -> None:
    pages = Pages([Group(5)])
    sound, sick = sequence(2 * PAGE + 1), sequence(2 * PAGE + 1)
    assert pages.admit(sound)
    compute(pages, sound)
    assert pages.admit(sick)
    kept = list(table(sound))
    pages.free(sick, failed=True)
    new = sequence(others(5000, 2 * PAGE))
    assert pages.admit(new)
    assert not set(table(new)) & set(kept)
    pages.free(sound)
    pages.free(new)
    assert pages.used_tokens == 0


def test_a_table_with_a_sliding_window_repeats_its_pages() -> None:
    pages = Pages([Group(8), Group(6, ring=3)])
    one = sequence(5 * PAGE, max_tokens=3 * PAGE)
    assert pages.admit(one)
    full, ring = table(one, 0), table(one, 1)
    assert len(set(full)) == 5
    assert ring == [*ring[:3], *ring[:2]]
    assert len(set(ring)) == 3
    assert pages.grow(one, 8 * PAGE)
    assert len(set(table(one, 0))) == 8
    assert table(one, 1) == [*ring[:3], *ring[:3], *ring[:2]]
    pages.free(one)
    assert pages.used_tokens == 0
    assert pages.admit(sequence(8 * PAGE))


def test_where_a_layer_forgets_tokens_nothing_is_shared() -> None:
    pages = Pages([Group(8), Group(6, ring=3)])
    finished(pages, sequence(2 * PAGE + 1))
    again = sequence(2 * PAGE + 1)
    assert pages.admit(again)
    assert (again.computed, pages.prefix_tokens) == (0, 0)


def test_no_group_gives_pages_when_another_has_none() -> None:
    pages = Pages([Group(8), Group(2, ring=2)])
    assert pages.admit(sequence(2 * PAGE))
    assert not pages.admit(sequence(PAGE))
    assert pages.used_tokens == 2 * PAGE


def test_admission_leaves_a_page_for_every_sequence_that_will_still_grow() -> None:
    pages = Pages([Group(3)])
    growing = sequence(PAGE, max_tokens=PAGE)
    assert pages.admit(growing)
    assert not pages.admit(sequence(others(1000, 2 * PAGE)))
    assert pages.admit(sequence(others(1000, PAGE), max_tokens=0))
    assert pages.grow(growing, PAGE + 1)


def test_a_sequence_that_will_not_grow_is_left_no_page() -> None:
    pages = Pages([Group(3)])
    assert pages.admit(sequence(PAGE - 4, max_tokens=4))
    assert pages.admit(sequence(others(1000, 2 * PAGE)))


def test_a_sequence_without_pages_cannot_grow() -> None:
    with pytest.raises(RuntimeError, match="sequence 77 holds no pages"):
        Pages([Group(3)]).grow(sequence(1, number=77), 1)


def test_content_that_went_and_came_again_is_found_again() -> None:
    pages = Pages([Group(3)])
    for _ in range(3):
        finished(pages, sequence(others(0, 2 * PAGE + 1)))
        finished(pages, sequence(others(7000, 3 * PAGE)))
    assert pages.prefix_tokens == 0
    finished(pages, sequence(others(7000, 3 * PAGE)))
    assert pages.prefix_tokens == 2 * PAGE


def test_two_that_computed_the_same_at_once_leave_one_copy_to_be_found() -> None:
    pages = Pages([Group(6)])
    first, second = sequence(2 * PAGE + 1), sequence(2 * PAGE + 1)
    assert pages.admit(first)
    assert pages.admit(second)
    compute(pages, first)
    compute(pages, second)
    pages.free(first)
    pages.free(second)
    # four without content: both partial ones and the second copy
    taker = sequence(others(5000, 4 * PAGE))
    assert pages.admit(taker)
    pages.free(taker)
    again = sequence(2 * PAGE + 1)
    assert pages.admit(again)
    assert again.computed == 2 * PAGE


def test_what_one_owner_said_is_not_found_by_another() -> None:
    """Else a client could tell by the time of an answer what somebody else asked."""
    pages = Pages([Group(8)])
    first = sequence(2 * PAGE, owner="alice")
    assert pages.admit(first)
    compute(pages, first)
    pages.free(first)
    for owner, found in (("bob", 0), ("", 0), ("alice", PAGE)):
        other = sequence(2 * PAGE, owner=owner)
        assert pages.admit(other)
        assert other.computed == found
        pages.free(other)
