"""Logits to tokens."""

from collections import Counter

import pytest
import torch

from service.engine.sampling import Sampler
from service.engine.sequence import SamplingParams
from service.errors import NonFiniteLogits

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def params(**values: float | int | None) -> SamplingParams:
    return SamplingParams(max_tokens=1, **values)  # type: ignore[arg-type]


def drawn(logits: torch.Tensor, times: int = 4000, **values: float | int | None) -> Counter[int]:
    sampler = Sampler(params(seed=1, **values))
    return Counter(sampler.choose(logits) for _ in range(times))


def test_temperature_zero_takes_the_largest() -> None:
    assert drawn(LOGITS, 50, temperature=0.0) == {1: 50}


def test_a_tiny_temperature_is_greedy_and_never_overflows() -> None:
    for temperature in (1e-300, 1e-7, 1e-5, 1e-3):
        assert drawn(LOGITS * 1e4, 50, temperature=temperature) == {1: 50}


def test_a_top_k_of_one_is_greedy_at_any_temperature() -> None:
    assert drawn(LOGITS, 50, temperature=2.0, top_k=1) == {1: 50}


def test_tokens_come_with_the_probabilities_of_the_model() -> None:
    counts = drawn(LOGITS)
    shares = [counts[token] / 4000 for token in range(4)]
    assert shares == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    def expected(temperature: float) -> list[float]:
        return torch.softmax(LOGITS / temperature, -1).tolist()

    for temperature in (0.5, 2.0):
        counts = drawn(LOGITS, temperature=temperature)
        shares = [counts[token] / 4000 for token in range(4)]
        assert shares == pytest.approx(expected(temperature), abs=0.03)


def test_top_k_keeps_the_k_likeliest_with_their_proportions() -> None:
    counts = drawn(LOGITS, top_k=2)
    assert counts.keys() == {1, 3}
    assert counts[1] / 4000 == pytest.approx(4 / 7, abs=0.03)


def test_a_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert drawn(LOGITS, top_k=1000).keys() == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.0, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert drawn(LOGITS, 1000, top_p=top_p).keys() == kept


def test_top_p_counts_among_what_top_k_left() -> None:
    # Of the two that are left, the first has 4/7 = 0.57.
    assert drawn(LOGITS, 1000, top_k=2, top_p=0.5).keys() == {1}
    assert drawn(LOGITS, 1000, top_k=2, top_p=0.6).keys() == {1, 3}


def test_top_p_reaches_beyond_the_first_thousand_when_it_has_to() -> None:
    flat = torch.zeros(5000)
    flat[:4000] += 1e-3  # likelier than the last thousand
    tokens = drawn(flat, 20_000, top_p=0.7).keys()
    assert max(tokens) < 4000
    assert 3300 < len(tokens) <= 3501


@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (1.0, 2)])
def test_the_ends_of_the_random_range_draw_a_possible_token(
    monkeypatch: pytest.MonkeyPatch, point: float, token: int
) -> None:
    logits = torch.tensor([-1e30, 0.0, 1.0, -1e30])
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.tensor(point).double())
    assert Sampler(params()).choose(logits) == token


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((1000,), -1e30)
    logits[500] = 0.0
    assert drawn(logits, 500) == {500: 500}


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = torch.zeros(1000)

    def tokens(seed: int) -> list[int]:
        sampler = Sampler(params(seed=seed))
        return [sampler.choose(logits) for _ in range(10)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_a_seed_does_not_depend_on_what_is_sampled_beside_it() -> None:
    logits = torch.zeros(1000)
    alone = Sampler(params(seed=3))
    expected = [alone.choose(logits) for _ in range(10)]
    beside, other = Sampler(params(seed=3)), Sampler(params())
    found = []
    for _ in range(10):
        other.choose(logits)
        torch.rand(3)
        found.append(beside.choose(logits))
    assert found == expected


def test_without_a_seed_two_sequences_differ() -> None:
    logits = torch.zeros(100_000)
    one, two = Sampler(params()), Sampler(params())
    assert [one.choose(logits) for _ in range(5)] != [two.choose(logits) for _ in range(5)]


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, 2**64 + 5, -(2**70)])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert 0 <= Sampler(params(seed=seed)).choose(LOGITS) < 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nothing_is_sampled_from_garbage(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NonFiniteLogits, match="1 NaN or infinite values among 4 logits"):
        Sampler(params(temperature=temperature)).choose(logits)
