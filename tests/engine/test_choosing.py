"""Logits to tokens, many sequences at once."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.logits_process import MinPLogitsWarper
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper
from transformers.generation.logits_process import TopKLogitsWarper
from transformers.generation.logits_process import TopPLogitsWarper

from service.engine import choosing
from service.engine import drawing
from service.engine.choosing import Chosen
from service.engine.choosing import choose
from service.engine.choosing import greedy_only
from service.engine.choosing import launch
from service.engine.params import SamplingParams
from service.engine.params import check
from service.engine.state import State
from service.errors import InvalidRequest
from service.errors import NonFiniteLogits
from service.errors import StepFailed

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def params(**values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1000, **{"temperature": 1.0, **values})


def state(prompt: Sequence[int] = (), **values: Any) -> State:
    return State(params(**values), prompt)


def one(logits: torch.Tensor, of: State) -> Chosen:
    (found,) = choose(logits[None], [of])
    assert isinstance(found, Chosen), found
    return found


def tokens(logits: torch.Tensor, times: int, of: State) -> list[int]:
    return [one(logits, of).token for _ in range(times)]


def drawn(logits: torch.Tensor, times: int = 4000, **values: Any) -> Counter[int]:
    """What so many rows with the same logits draw, each with a seed of its own."""
    states = [state(seed=seed, **values) for seed in range(times)]
    found = choose(logits.expand(times, -1), states)
    return Counter(each.token for each in found if isinstance(each, Chosen))


def gaussian(*shape: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def chi_square(counts: Counter[int], expected: Sequence[float]) -> float:
    """Pearson's statistic for each degree of freedom; about 1 if the counts fit."""
    total = sum(counts.values())
    possible = [(counts[i], p * total) for i, p in enumerate(expected) if p > 0]
    assert set(counts) <= {i for i, p in enumerate(expected) if p > 0}
    return sum((n - e) ** 2 / e for n, e in possible) / (len(possible) - 1)


class Allowing:
    """A constraint: one mask for each token, in turn; remembers what it accepted."""

    def __init__(self, *masks: torch.Tensor | None) -> None:
        self.masks = list(masks)
        self.accepted: list[int] = []

    def allowed(self) -> torch.Tensor | None:
        return self.masks[len(self.accepted) % len(self.masks)]

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def only(vocabulary: int, *allowed: int) -> torch.Tensor:
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    mask[list(allowed)] = True
    return mask


# --- greedy


def test_temperature_zero_takes_the_largest():
    assert drawn(LOGITS, 50, temperature=0.0) == {1: 50}


@pytest.mark.parametrize(
    "values", [{"temperature": 1e-300}, {"temperature": 1e-7}, {"top_k": 1}, {"top_p": 0.0}]
)
def test_what_leaves_no_choice_is_greedy_even_among_equals(values: dict[str, float]):
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert drawn(logits, 50, **values) == {1: 50}


@pytest.mark.parametrize("temperature", [2e-6, 1e-5, 1e-3])
def test_a_tiny_temperature_never_overflows(temperature: float):
    assert drawn(LOGITS * 1e4, 50, temperature=temperature) == {1: 50}


@pytest.mark.parametrize("temperature", [1e20, 1e39, 1e300])
def test_an_enormous_temperature_is_uniform_and_forbids_what_is_forbidden(temperature: float):
    constraint = Allowing(only(4, 0, 3))
    counts = drawn(LOGITS, 400, temperature=temperature, constraint=constraint)
    assert counts.keys() == {0, 3}
    assert counts[0] / 400 == pytest.approx(0.5, abs=0.1)


def test_a_batch_of_plain_greedy_rows_is_nothing_but_greedy(monkeypatch: pytest.MonkeyPatch):
    logits = gaussian(8, 50)
    states = [state(temperature=0.0) for _ in range(8)]
    assert greedy_only(states)
    # Nothing below may be asked for.
    monkeypatch.setattr(choosing, "drawing", None)
    monkeypatch.setattr(choosing, "edit", None)
    assert choose(logits, states) == [Chosen(token) for token in logits.argmax(-1).tolist()]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.0, "presence_penalty": 0.5},
        {"temperature": 0.0, "logit_bias": ((1, 1.0),)},
        {"temperature": 0.0, "constraint": Allowing(None)},
        {"temperature": 0.0, "min_tokens": 1, "stop_ids": frozenset({2})},
    ],
)
def test_a_row_that_asks_for_anything_more_is_not_left_to_greedy(values: dict[str, Any]):
    assert not greedy_only([state(temperature=0.0), state(**values)])


def test_what_greedy_found_before_is_not_looked_for_again():
    logits = gaussian(2, 50)
    ready = torch.tensor([7, 8]), torch.tensor([True, True])
    found = launch(logits, [state(temperature=0.0)] * 2, ready).collect()
    assert found == [Chosen(7), Chosen(8)]


# --- distributions


def test_tokens_come_with_the_probabilities_of_the_model():
    logits = gaussian(40, spread=1.0)
    counts = drawn(logits, 20_000)
    assert chi_square(counts, logits.softmax(-1).tolist()) < 1.5


def test_one_sequence_draws_the_distribution_token_after_token():
    counts = Counter(tokens(LOGITS, 4000, state(seed=5)))
    assert chi_square(counts, [0.1, 0.4, 0.2, 0.3]) < 3


def test_a_draw_over_many_blocks_has_the_probabilities_of_the_model():
    size = drawing.BLOCK * 3 + 17
    logits = torch.full((size,), -20.0)
    places = [0, 511, 512, 1023, 1024, 1500, 1536, size - 1]
    shares = torch.tensor([0.05, 0.2, 0.1, 0.1, 0.2, 0.05, 0.1, 0.2])
    logits[places] = shares.log()
    counts = drawn(logits, 10_000)
    found = Counter({i: counts[place] for i, place in enumerate(places)})
    assert sum(counts.values()) - sum(found.values()) < 5  # the rest has 3e-6
    assert chi_square(found, shares.tolist()) < 2


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature: float):
    counts = drawn(LOGITS, temperature=temperature)
    assert chi_square(counts, torch.softmax(LOGITS / temperature, -1).tolist()) < 3


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]):
    assert drawn(LOGITS, 1000, top_p=top_p).keys() == kept


def test_top_p_counts_among_what_top_k_left():
    # Of the two that are left, the first has 4/7 = 0.57.
    assert drawn(LOGITS, 1000, top_k=2, top_p=0.5).keys() == {1}
    assert drawn(LOGITS, 1000, top_k=2, top_p=0.6).keys() == {1, 3}


def test_a_top_k_beyond_the_vocabulary_keeps_all():
    assert drawn(LOGITS, top_k=1000).keys() == {0, 1, 2, 3}
    assert drawn(LOGITS, top_k=4).keys() == {0, 1, 2, 3}


def test_equals_of_the_last_that_is_kept_are_kept():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0])
    assert drawn(logits, 500, top_k=2).keys() == {1, 2, 3, 4}


def test_min_p_drops_what_is_unlikely_beside_the_likeliest():
    assert drawn(LOGITS, 1000, min_p=0.4).keys() == {1, 2, 3}
    assert drawn(LOGITS, 1000, min_p=0.6).keys() == {1, 3}
    assert drawn(LOGITS, 1000, min_p=0.6, top_p=0.3).keys() == {1}
    assert drawn(LOGITS, 1000, min_p=0.6, top_p=0.95).keys() == {1, 3}
    assert drawn(LOGITS, 1000, min_p=0.6, top_k=3).keys() == {1, 3}


@pytest.mark.parametrize("top_k", [0, 1500, 4500])
def test_a_nucleus_of_thousands_is_looked_at_again(top_k: int):
    logits = gaussian(5000, spread=0.1)
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True)
    within = order[: top_k or 5000]
    before = probabilities[within].cumsum(-1) - probabilities[within]
    nucleus = within[before < 0.7 * probabilities[within].sum()].tolist()
    assert len(nucleus) > choosing.FEW - 100
    found = drawn(logits, 500, top_p=0.7, top_k=top_k)
    ranks = sorted(nucleus.index(token) for token in found)
    assert len(nucleus) * 0.95 < ranks[-1] < len(nucleus)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((1000,), -1e30)
    logits[500] = 0.0
    assert drawn(logits, 500) == {500: 500}


@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (1.0 - 2**-53, 700), (1.0, 700)])
def test_the_ends_of_the_random_range_draw_a_possible_token(point: float, token: int):
    weights = torch.zeros(1, drawing.padded(800))
    weights[0, [1, 2, 700]] = 1.0
    assert drawing.draw(weights, torch.tensor([point]).double()).tolist() == [token]


# --- as transformers does it


def of_transformers(logits: torch.Tensor, prompt: Sequence[int], p: SamplingParams) -> torch.Tensor:
    """Probabilities of the next token, [vocabulary]."""
    processors = LogitsProcessorList()
    if p.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    processors.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        processors.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        processors.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        processors.append(MinPLogitsWarper(p.min_p))
    return processors(torch.tensor([list(prompt)]), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"temperature": 1.7, "top_k": 40},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.6},
        {"temperature": 1.2, "min_p": 0.05},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 1.0, "top_k": 1500, "top_p": 0.99},
        {"temperature": 3.0, "top_p": 0.97},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.9, "repetition_penalty": 0.7, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_token_is_drawn_exactly_where_transformers_distribution_puts_it(
    values: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
):
    """Points just inside both ends of a token's share of [0, 1) must give that token."""
    logits = gaussian(3000, seed=seed)
    prompt = random.Random(seed).sample(range(3000), 200)
    expected = of_transformers(logits, prompt, params(**values)).double()
    ends = expected.cumsum(-1) / expected.sum()
    wide = (expected > 1e-4).nonzero()[:, 0]
    share = expected[wide] / expected.sum()
    points = torch.cat((ends[wide] - share * 0.95, ends[wide] - share * 0.05)).tolist()
    states = [state(prompt, **values) for _ in points]
    for each, point in zip(states, points, strict=True):
        monkeypatch.setattr(each, "_random", lambda point=point: point)
    found = choose(logits.expand(len(points), -1), states)
    assert [each.token for each in found if isinstance(each, Chosen)] == [*wide.tolist()] * 2
    # and nothing that they exclude is ever drawn
    seeded = [state(prompt, seed=seed, **values) for seed in range(100)]
    for each in choose(logits.expand(100, -1), seeded):
        assert isinstance(each, Chosen)
        assert expected[each.token] > 0


# --- bias and penalties


def test_a_bias_moves_its_token_and_no_other():
    logits = torch.zeros(4)
    counts = drawn(logits, logit_bias=((2, 1.0), (0, -100.0)))
    expected = torch.softmax(torch.tensor([-100.0, 0.0, 1.0, 0.0]), -1).tolist()
    expected[0] = 0.0
    assert chi_square(counts, expected) < 3
    assert one(logits, state(temperature=0.0, logit_bias=((3, 0.1),))).token == 3


def test_a_frequency_penalty_grows_with_each_time_and_ignores_the_prompt():
    logits = torch.tensor([3.0, 2.5, 0.0])
    counted = state([0, 0, 0], temperature=0.0, frequency_penalty=0.3)
    # 3.0 2.5 | 2.7 2.5 | 2.4 2.5 | 2.4 2.2 | 2.1 2.2
    assert tokens(logits, 5, counted) == [0, 0, 1, 0, 1]


def test_a_presence_penalty_is_taken_once_and_ignores_the_prompt():
    logits = torch.tensor([3.0, 2.5, 2.4])
    counted = state([0], temperature=0.0, presence_penalty=0.7)
    assert tokens(logits, 6, counted) == [0, 1, 2, 0, 0, 0]


def test_a_repetition_penalty_beside_it_does_not_make_the_prompt_present():
    logits = torch.tensor([3.0, 2.0])
    both = state([0], temperature=0.0, repetition_penalty=1.1, presence_penalty=1.9)
    # 2.73 2.0 | 0.83 2.0
    assert tokens(logits, 2, both) == [0, 1]


def test_a_repetition_penalty_counts_the_prompt_and_the_answer_once():
    logits = torch.tensor([3.0, 2.0, 1.9, -1.0])
    counted = state([0, 0, 0], temperature=0.0, repetition_penalty=2.0)
    # 1.5 2.0 1.9 | 1.5 1.0 1.9 | 1.5 1.0 0.95 for ever
    assert tokens(logits, 5, counted) == [1, 2, 0, 0, 0]


def test_a_repetition_penalty_makes_a_negative_logit_less_likely():
    logits = torch.tensor([-1.0, -1.5])
    assert one(logits, state([0], temperature=0.0, repetition_penalty=2.0)).token == 1


def test_a_negative_penalty_rewards():
    logits = torch.tensor([1.0, 2.0, 0.0])
    favoured = state(temperature=0.0, presence_penalty=-2.0)
    favoured.accept(2)
    assert one(logits, favoured).token in (1,)
    favoured = state(temperature=0.0, frequency_penalty=-2.0)
    favoured.accept(2)
    favoured.accept(2)
    assert one(logits, favoured).token == 2


def test_rows_are_penalised_for_their_own_history_only():
    logits = torch.tensor([3.0, 2.9, 2.8]).expand(3, 3)
    states = [
        state([0], temperature=0.0, repetition_penalty=2.0),
        state([0, 1], temperature=0.0),
        state([0, 1], temperature=0.0, repetition_penalty=2.0),
    ]
    assert [each.token for each in choose(logits, states)] == [1, 0, 2]


def test_a_token_of_the_prompt_or_a_stop_id_without_a_logit_changes_nothing():
    odd = state(
        [2, 4, 600], temperature=0.0, repetition_penalty=2.0, stop_ids=frozenset({9}), min_tokens=2
    )
    assert one(torch.tensor([1.0, 3.0, 4.0, 0.0]), odd).token == 1


# --- constraints and stop ids


def test_a_constraint_is_never_violated():
    vocabulary = 700
    rng = random.Random(0)
    masks = [only(vocabulary, *rng.sample(range(vocabulary), rng.choice((1, 3, 200)))) for _ in
             range(40)]  # fmt: skip
    logits = gaussian(40, vocabulary, spread=10.0)
    kinds = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}]
    constraints = [Allowing(mask) for mask in masks]
    states = [
        state(constraint=constraint, seed=i, logit_bias=((3, 100.0),), **kinds[i % 5])
        for i, constraint in enumerate(constraints)
    ]
    for _ in range(20):
        for row, found in enumerate(choose(logits, states)):
            assert isinstance(found, Chosen)
            assert masks[row][found.token]
    assert all(len(constraint.accepted) == 20 for constraint in constraints)


def test_a_constraint_without_a_mask_allows_everything_for_that_token():
    logits = torch.tensor([0.0, 1.0, 2.0])
    constraint = Allowing(only(3, 0), None, only(3, 1))
    assert tokens(logits, 4, state(temperature=0.0, constraint=constraint)) == [0, 2, 1, 0]
    assert constraint.accepted == [0, 2, 1, 0]


def test_a_constraint_that_allows_nothing_fails_its_sequence_only():
    logits = torch.zeros(3, 4)
    for temperature in (0.0, 1.0):
        stuck = state(temperature=temperature, constraint=Allowing(only(4)), logprobs=1)
        before, error, after = choose(logits, [state(), stuck, state(top_p=0.5)])
        assert isinstance(error, InvalidRequest)
        assert "leave no token" in error.message
        assert isinstance(before, Chosen)
        assert isinstance(after, Chosen)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(3, dtype=torch.bool), r"mask of torch.bool \(3,\).*torch.bool \(4,\)"),
        (torch.ones(4), r"mask of torch.float32 \(4,\)"),
    ],
)
def test_a_mask_of_the_wrong_shape_fails_its_sequence_only(mask: torch.Tensor, says: str):
    error, other = choose(torch.zeros(2, 4), [state(constraint=Allowing(mask)), state()])
    assert isinstance(error, StepFailed)
    assert isinstance(other, Chosen)
    with pytest.raises(StepFailed, match=says):
        raise error


@pytest.mark.parametrize("broken", ["allowed", "accept"])
def test_a_constraint_that_raises_fails_its_sequence_only(broken: str):
    def fail(*_: Any) -> None:
        raise KeyError("grammar")

    constraint = Allowing(None)
    setattr(constraint, broken, fail)
    error, other = choose(torch.zeros(2, 4), [state(constraint=constraint), state()])
    assert isinstance(error, StepFailed)
    assert error.message == "The constraint of this request raised KeyError: 'grammar'"
    assert isinstance(other, Chosen)


def test_no_stop_id_is_chosen_before_min_tokens_whatever_its_bias():
    logits = torch.tensor([5.0, 4.0, 0.0])
    patient = state(
        temperature=0.0, stop_ids=frozenset({0}), min_tokens=3, logit_bias=((0, 100.0),)
    )
    assert tokens(logits, 4, patient) == [1, 1, 1, 0]
    assert not patient.plain
    later = state(temperature=0.0, stop_ids=frozenset({0}), min_tokens=1)
    assert not later.plain
    assert tokens(logits, 2, later) == [1, 0]
    assert later.plain


# --- randomness


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    logits = torch.zeros(1000)
    assert tokens(logits, 10, state(seed=1)) == tokens(logits, 10, state(seed=1))
    assert tokens(logits, 10, state(seed=1)) != tokens(logits, 10, state(seed=2))


def test_the_answers_to_one_request_differ_and_each_comes_again():
    def answer(choice: int) -> list[int]:
        return tokens(torch.zeros(1000), 10, State(params(seed=1), choice=choice))

    assert answer(0) != answer(1)
    assert answer(1) == answer(1)


def test_without_a_seed_two_sequences_differ():
    logits = torch.zeros(100_000)
    assert tokens(logits, 5, state()) != tokens(logits, 5, state())


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, 2**64 + 5, -(2**70)])
def test_any_whole_number_is_a_seed(seed: int):
    assert 0 <= one(LOGITS, state(seed=seed)).token < 4


def test_the_seed_of_a_release_is_the_seed_of_the_next():
    """Who notes a seed gets the same tokens from a later version."""
    assert tokens(torch.zeros(1000), 6, state(seed=42)) == [278, 977, 844, 969, 392, 218]


ASKED = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 1, 2, 50, 1023, 1025, 1299, 1300, 9999]),
        "top_p": st.sampled_from([0.0, 0.2, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "logit_bias": st.sampled_from([(), ((3, 100.0),), ((4, -100.0), (5, 2.5))]),
        "min_tokens": st.sampled_from([0, 2]),
        "stop_ids": st.sampled_from([frozenset(), frozenset({1, 5, 9})]),
        "logprobs": st.sampled_from([None, 0, 3]),
        "masked": st.booleans(),
        "seed": st.integers(0, 2**40),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(asked=st.lists(ASKED, min_size=1, max_size=8), shuffle=st.randoms(use_true_random=False))
def test_neither_neighbours_nor_the_place_in_the_batch_change_an_answer(
    asked: list[dict[str, Any]], shuffle: random.Random
):
    vocabulary, steps = 1300, 4
    steps_logits = gaussian(steps, len(asked), vocabulary, seed=3).bfloat16()

    def states() -> list[State]:
        mask = gaussian(vocabulary, seed=9) > 0
        return [
            state(
                range(0, 40, 3),
                constraint=Allowing(mask, None) if each["masked"] else None,
                **{key: value for key, value in each.items() if key != "masked"},
            )
            for each in asked
        ]

    alone = states()
    expected = [
        [choose(logits[row : row + 1], [alone[row]])[0] for logits in steps_logits]
        for row in range(len(asked))
    ]
    together = states()
    found: list[list[Any]] = [[] for _ in asked]
    for logits in steps_logits:
        order = shuffle.sample(range(len(asked)), len(asked))
        for row, each in zip(
            order, choose(logits[order], [together[row] for row in order]), strict=True
        ):
            found[row].append(each)
    for mine, theirs in zip(expected, found, strict=True):
        assert [each.token for each in mine] == [each.token for each in theirs]
        for one_, other in zip(mine, theirs, strict=True):
            assert one_.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [t for t, _ in one_.top] == [t for t, _ in other.top]


# --- logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logprobs_are_log_softmax_of_the_raw_logits(dtype: torch.dtype):
    logits = gaussian(3, 2000).to(dtype)
    exact = logits.double().log_softmax(-1)
    states = [
        state(temperature=0.0, logprobs=0),
        state(temperature=0.3, logprobs=5, logit_bias=((7, 100.0),), top_k=3, seed=1),
        state([1, 2], temperature=2.0, logprobs=20, repetition_penalty=1.5, seed=2),
    ]
    for row, (found, count) in enumerate(zip(choose(logits, states), (0, 5, 20), strict=True)):
        assert isinstance(found, Chosen)
        assert found.logprob == pytest.approx(float(exact[row, found.token]), abs=1e-4)
        assert len(found.top) == count
        values = [value for _, value in found.top]
        assert values == pytest.approx(exact[row].topk(count).values.tolist(), abs=1e-4)
        for token, value in found.top:
            assert value == pytest.approx(float(exact[row, token]), abs=1e-4)
    assert found is not None


def test_a_biased_token_keeps_the_probability_the_model_gave_it():
    found = one(LOGITS, state(temperature=0.0, logit_bias=((0, 50.0),), logprobs=1))
    assert found.token == 0
    assert found.logprob == pytest.approx(float(LOGITS[0]), abs=1e-6)
    assert found.top == ((1, pytest.approx(float(LOGITS[1]), abs=1e-6)),)


def test_a_row_that_is_drawn_again_gets_the_logprob_of_the_second_draw():
    logits = gaussian(1, 5000, spread=0.1).expand(30, -1)
    states = [state(top_p=0.9, logprobs=2, seed=seed) for seed in range(30)]
    exact = logits[0].log_softmax(-1)
    for found in choose(logits, states):
        assert isinstance(found, Chosen)
        assert found.logprob == pytest.approx(float(exact[found.token]), abs=1e-5)


def test_more_logprobs_than_tokens_are_all_there_are():
    assert len(one(LOGITS, state(logprobs=20)).top) == 4


# --- garbage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"top_k": 2, "repetition_penalty": 1.2},
        {"logprobs": 2},
        {"top_p": 0.9, "constraint": Allowing(only(40, 3)), "logprobs": 0},
    ],
    ids=" ".join,
)
def test_garbage_fails_its_sequence_and_no_other(
    bad: float, values: dict[str, Any], dtype: torch.dtype
):
    logits = gaussian(3, 40).to(dtype)
    logits[1, 17:19] = bad
    guilty = state([1], **values)
    others = [state(temperature=0.0), state(seed=1, top_p=0.9, logprobs=1)]
    expected = choose(
        logits[[0, 2]], [state(temperature=0.0), state(seed=1, top_p=0.9, logprobs=1)]
    )
    before, error, after = choose(logits, [others[0], guilty, others[1]])
    assert isinstance(error, NonFiniteLogits)
    assert "2 NaN or infinite values among 40 logits" in error.message
    assert before == expected[0]
    assert after.token == expected[1].token


def test_a_sequence_that_failed_has_not_moved():
    logits = gaussian(1, 40)
    constraint = Allowing(None)
    failing = state(seed=4, frequency_penalty=1.0, constraint=constraint)
    assert isinstance(choose(logits * torch.nan, [failing])[0], NonFiniteLogits)
    assert constraint.accepted == []
    assert one(logits[0], failing).token == one(logits[0], state(seed=4)).token


def test_no_rows_are_no_tokens():
    assert choose(torch.zeros(0, 40), []) == []


def test_rows_and_states_must_be_as_many():
    with pytest.raises(ValueError, match=r"2 states, but logits of shape \(3, 40\)"):
        choose(torch.zeros(3, 40), [state(), state()])


def test_the_logits_are_left_as_they_were():
    logits = gaussian(3, 40)
    before = logits.clone()
    choose(logits, [state(top_p=0.5), state([1], repetition_penalty=2.0), state(logprobs=2)])
    assert torch.equal(logits, before)


# --- what is refused before


@pytest.mark.parametrize(
    ("values", "param", "says"),
    [
        ({"temperature": -0.1}, "temperature", "temperature is -0.1; give 0 or more"),
        ({"temperature": float("nan")}, "temperature", "temperature is nan"),
        ({"temperature": float("inf")}, "temperature", "temperature is inf"),
        ({"top_k": -1}, "top_k", "top_k is -1; give 0 or more"),
        ({"top_p": 1.1}, "top_p", "top_p is 1.1; give from 0 to 1"),
        ({"min_p": -1.0}, "min_p", "min_p is -1.0; give from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "give from 0.01 to 100"),
        ({"presence_penalty": 2.5}, "presence_penalty", "give from -2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "give from -2 to 2"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias", r"logit_bias\[3\] is 101.0; give from -100"),
        ({"logit_bias": ((50, 1.0),)}, "logit_bias", "token 50; this model's ids are 0 to 49"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias", "token -1"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias", "token 3 twice"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21; give from 0 to 20"),
        ({"min_tokens": 1001}, "min_tokens", "min_tokens is 1001; give from 0 to 1000"),
    ],
)
def test_a_value_that_cannot_be_sampled_with_is_refused_by_name(
    values: dict[str, Any], param: str, says: str
):
    with pytest.raises(InvalidRequest, match=says) as caught:
        check(params(**values), 50)
    assert caught.value.param == param


def test_the_ends_of_every_range_are_taken():
    for values in (
        {"top_p": 0.0, "min_p": 1.0, "presence_penalty": -2.0, "logprobs": 20, "min_tokens": 1000},
        {"logit_bias": ((0, -100.0), (49, 100.0)), "repetition_penalty": 100.0, "top_k": 10**9},
    ):
        check(params(**values), 50)
        assert 0 <= one(gaussian(50), state([1, 2], **values)).token < 50
