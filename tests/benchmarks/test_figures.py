import pytest

from benchmarks import figures
from benchmarks.engine import turned
from benchmarks.engine import waits
from service.cli.timing import Answer


def answer(began: float, *times: float, tokens: int | None = None, error: str | None = None):
    count = len(times) if tokens is None else tokens
    return Answer(began, list(times), count, prompt_tokens=3, error=error)


def test_a_run_is_summed_from_the_first_request_to_the_last_token():
    found = figures.summary([answer(0.0, 1.0, 1.5, 3.0), answer(0.5, 2.0, 5.0)])
    assert found["rate"] == pytest.approx(5 / 5.0)
    assert found["first_ms"] == pytest.approx(1250)
    assert found["first_p95_ms"] == pytest.approx(1500)
    assert found["gap_ms"] == pytest.approx(1500)
    assert found["gap_p95_ms"] == pytest.approx(3000)
    assert found["tokens"] == 5
    assert found["prompt_tokens"] == 6


def test_tokens_that_arrived_together_count_all():
    assert figures.summary([answer(0.0, 1.0, 2.0, tokens=8)])["rate"] == pytest.approx(4.0)


def test_a_run_with_a_failed_or_an_empty_answer_has_no_figures():
    with pytest.raises(RuntimeError, match="1 of 2 requests failed: broken"):
        figures.summary([answer(0.0, 1.0), answer(0.0, error="broken")])
    with pytest.raises(RuntimeError, match="1 of 2 answers were empty"):
        figures.summary([answer(0.0, 1.0), answer(0.0)])


def test_a_step_is_measured_while_all_decode():
    steady = [1.0 + 0.1 * n for n in range(20)]
    late = [1.5 + 0.1 * n for n in range(8)]  # the other is alone before and after, and faster
    alone = [0.5, 0.51, 0.52]
    found = figures.step_s([answer(0.0, *alone, *steady), answer(0.0, *late)])
    assert found == pytest.approx(0.1)


def test_without_a_time_in_which_all_decode_there_is_no_step():
    assert figures.step_s([answer(0.0, 1.0, 2.0), answer(0.0, 3.0, 4.0)]) is None
    assert figures.step_s([]) is None


def test_a_ratio_is_of_neighbouring_runs():
    assert figures.ratio([10.0, 40.0, 30.0], [5.0, 10.0, 10.0]) == {
        "median": 3.0,
        "low": 2.0,
        "high": 4.0,
    }


def test_figures_come_in_the_order_of_the_runs_and_without_missing_ones():
    rows = [
        {"engine": "a", "streams": 1, "run": 2, "rate": 3.0},
        {"engine": "a", "streams": 1, "run": 0, "rate": 1.0},
        {"engine": "a", "streams": 1, "run": 1, "rate": None},
        {"engine": "b", "streams": 1, "run": 0, "rate": 9.0},
        {"engine": "a", "streams": 8, "run": 0, "rate": 9.0},
    ]
    assert figures.runs_of(rows, "a", 1, "rate") == [1.0, 3.0]


def test_answers_survive_json():
    one = answer(0.5, 1.0, 2.0, error="late")
    assert Answer.of(one.as_dict()) == one


def test_the_order_of_engines_turns_with_the_runs():
    assert [turned(["a", "b", "c"], run) for run in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
    assert turned([], 3) == []


def background() -> list[Answer]:
    """Two streams with a token every 0.1 s, from 1 to 5 s, and every 0.3 s from 5 to 8 s."""
    times = [1.0 + 0.1 * n for n in range(40)] + [5.0 + 0.3 * n for n in range(11)]
    return [answer(0.0, *times), answer(0.0, *times)]


def test_waits_tell_idle_steps_from_those_beside_a_long_prompt():
    alone = [answer(0.0, 0.4, 0.5)]
    found = waits(alone, background(), [answer(3.0, 3.5, 3.6), answer(5.05, 7.0, 7.3)])
    assert found["first_alone_ms"] == pytest.approx(400)
    assert found["first_loaded_ms"] == pytest.approx(500)
    assert found["step_idle_ms"] == pytest.approx(100)
    assert found["first_allowed_ms"] == pytest.approx(900)
    assert found["gap_long_prompt_p95_ms"] == pytest.approx(300)
    assert found["long_prompt_first_ms"] == pytest.approx(1950)


def test_waits_are_refused_if_the_background_did_not_last():
    with pytest.raises(RuntimeError, match="--latency-answer"):
        waits([answer(0.0, 0.4)], background(), [answer(3.0, 3.5), answer(5.05, 9.0)])


def test_waits_are_refused_if_a_request_failed():
    with pytest.raises(RuntimeError, match="a request failed: broken"):
        waits([answer(0.0, 0.4)], background(), [answer(3.0, error="broken")])
