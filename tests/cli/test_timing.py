"""Requests at once, and figures of what came."""

import pytest

from service.cli import timing
from service.cli.timing import Answer


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.95, 4), (1.0, 4)]
)
def test_a_percentile_is_one_of_the_values(share: float, expected: float):
    assert timing.percentile([4, 2, 1, 3], share) == expected


def test_a_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="of nothing"):
        timing.percentile([], 0.5)


def test_a_gap_is_between_two_arrivals_of_one_answer():
    found = timing.figures([Answer(0.0, [1.0, 1.5], 4), Answer(1.0, [2.0], 1)])
    assert (found["gap_ms"], found["gap_p95_ms"]) == (500, 500)
    assert found["rate"] == pytest.approx(2.5)
    assert found["requests_rate"] == pytest.approx(1.0)
    assert timing.figures([Answer(0.0, [1.0], 1)])["gap_ms"] is None
