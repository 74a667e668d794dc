"""How much of a prompt may run beside others follows from how long steps took."""

from service.engine.pace import MOST_SLOWER
from service.engine.pace import Pace


def test_until_both_speeds_are_known_a_step_may_be_full() -> None:
    pace = Pace(least=64, most=512)
    assert pace.prefill_tokens == 512
    pace.note(0, 300, 0.6)
    assert pace.prefill_tokens == 512


def test_a_prompt_beside_others_makes_a_step_at_most_so_many_times_slower() -> None:
    pace = Pace(least=1, most=512)
    pace.note(0, 100, 0.4)  # 4 ms a token
    pace.note(8, 0, 0.1)
    assert pace.prefill_tokens == int(0.1 * (MOST_SLOWER - 1) / 0.004)


def test_a_step_with_both_tells_what_its_prompt_took() -> None:
    pace = Pace(least=1, most=512)
    pace.note(8, 0, 0.1)
    for _ in range(40):
        pace.note(8, 504, 2.0)
    per_token = (2.0 - 0.1) / 504
    assert abs(pace.prefill_tokens - 0.15 / per_token) <= 1


def test_it_is_never_less_than_the_least_nor_more_than_a_step() -> None:
    slow, fast = Pace(least=64, most=512), Pace(least=64, most=512)
    for pace, token_s in ((slow, 1.0), (fast, 1e-6)):
        pace.note(0, 100, 100 * token_s)
        pace.note(4, 0, 0.1)
    assert slow.prefill_tokens == 64
    assert fast.prefill_tokens == 512


def test_a_clock_that_jumps_back_does_not_break_it() -> None:
    pace = Pace(least=64, most=512)
    pace.note(4, 0, 0.1)
    pace.note(4, 200, -5.0)
    assert 64 <= pace.prefill_tokens <= 512
