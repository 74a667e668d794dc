"""Logprobs of the prompt's own tokens, on every path, whatever the steps cut the prompt into."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from transformers import T5Config

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.engine.sequence import Stream
from service.errors import InvalidRequest
from service.errors import NonFiniteLogits
from service.placement import kv
from tests.engine.scripted import read_all
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_model

CONTEXT = 300
LONG = tuple((7 * i * i + 3 * i) % 256 for i in range(3 * kv.SCORE_TOKENS + 9))


def same(*, model: object, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(inputs)


@contextmanager
def running(model: Any, **runner: Any) -> Iterator[Engine]:
    built = Runner(model, same, max_context=CONTEXT, max_sequences=3, **runner)
    engine = Engine(built, max_queue=8)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def asking(count: int, max_tokens: int = 0, **more: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=0.0, prompt_logprobs=count, logprobs=count, **more
    )


def expected(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-softmax of every position, by one plain forward."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def check(stream: Stream, ids: tuple[int, ...], logprobs: torch.Tensor, count: int) -> None:
    assert [chosen.token for chosen in stream.prompt_logprobs] == list(ids[1:])
    for position, chosen in enumerate(stream.prompt_logprobs):
        row = logprobs[position]
        assert chosen.logprob == pytest.approx(float(row[chosen.token]), abs=1e-3)
        wanted = row.topk(count)
        assert [value for _, value in chosen.top] == pytest.approx(wanted.values.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    "how", [{}, {"paged": True}, {"step_tokens": 5}], ids=["slots", "pages", "small steps"]
)
def test_every_token_of_a_prompt_is_scored_by_the_one_before(how):
    wanted = expected(tiny_model(), LONG)
    with running(tiny_model(), **how) as engine:
        assert engine.path == "ragged"
        others = [engine.submit((5, 6), SamplingParams(max_tokens=200)) for _ in range(2)]
        stream = engine.submit(LONG, asking(3))
        assert read_all(stream) == []
        assert stream.finish_reason == "length"
        check(stream, LONG, wanted, 3)
        for other in others:
            other.cancel()


def test_an_answer_follows_a_scored_prompt_and_a_computed_beginning_is_not_used_for_it():
    with running(tiny_model()) as engine:
        plain = engine.submit(LONG, SamplingParams(max_tokens=4, temperature=0.0))
        answer = read_all(plain)
        scored = engine.submit(LONG, asking(0, max_tokens=4))
        assert read_all(scored) == answer
        assert scored.cached_tokens == 0
        check(scored, LONG, expected(tiny_model(), LONG), 0)
        again = engine.submit(LONG, SamplingParams(max_tokens=4, temperature=0.0))
        assert read_all(again) == answer
        assert again.cached_tokens == len(LONG) - 1


def test_the_likeliest_token_has_exactly_the_first_of_the_top():
    ids = (5, 9, 13)
    with running(tiny_model()) as engine:
        answer = read_all(engine.submit(ids, SamplingParams(max_tokens=30, temperature=0.0)))
        stream = engine.submit((*ids, *answer), asking(1))
        read_all(stream)
    likeliest = stream.prompt_logprobs[len(ids) - 1 :]
    assert [chosen.logprob for chosen in likeliest] == [c.top[0][1] for c in likeliest]


def test_scores_are_those_of_one_prompt_after_a_preemption_too():
    """Three long answers do not fit the pages at once, so some prompts are computed twice."""
    with running(tiny_model(), paged=True, kv_tokens=320) as engine:
        streams = [engine.submit((*LONG[:60], i), asking(2, max_tokens=180)) for i in range(3)]
        for at, stream in enumerate(streams):
            read_all(stream)
            ids = (*LONG[:60], at)
            check(stream, ids, expected(tiny_model(), ids), 2)
        assert engine.stats().preemptions


def test_the_token_that_ends_an_answer_is_told_beside_it():
    with running(tiny_model()) as engine:
        first = read_all(engine.submit((5, 9), SamplingParams(max_tokens=1, temperature=0.0)))[0]
        stream = engine.submit((5, 9), asking(1, max_tokens=1, stop_ids=frozenset({first})))
        assert read_all(stream) == []
        assert stream.finish_reason == "stop"
        assert stream.ending.token == first
        assert stream.ending.logprob == stream.ending.top[0][1]


def test_a_prompt_whose_logits_are_no_numbers_fails_alone():
    model = tiny_model()
    with running(model) as engine:
        with torch.no_grad():
            model.get_input_embeddings().weight[77] = torch.nan
        sick = engine.submit((5, 77, 9, 6), asking(0))
        well = engine.submit((5, 9), asking(0))
        with pytest.raises(NonFiniteLogits):
            read_all(sick)
        assert read_all(well) == []


def test_no_tokens_at_all_are_only_asked_for_with_a_scored_prompt():
    with running(tiny_model()) as engine:
        with pytest.raises(InvalidRequest, match="max_tokens is 0; give 1 or more") as error:
            engine.submit((1, 2), SamplingParams(max_tokens=0))
        assert error.value.param == "max_tokens"
        with pytest.raises(InvalidRequest, match="logprobs is 21"):
            engine.submit((1, 2), asking(21))


def test_a_model_with_a_recurrent_state_scores_its_prompts_too():
    from transformers import MambaConfig
    from transformers import MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.3
    )
    model = MambaForCausalLM(config).eval()
    ids = LONG[:90]
    wanted = expected(model, ids)
    with running(model) as engine:
        assert engine.path == "plain"
        stream = engine.submit(ids, asking(2, max_tokens=2))
        assert len(read_all(stream)) == 2
        check(stream, ids, wanted, 2)


def test_a_prompt_that_goes_through_an_encoder_has_no_logprobs():
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    with running(AutoModelForSeq2SeqLM.from_config(config).eval()) as engine:
        with pytest.raises(InvalidRequest, match="an encoder reads it") as error:
            engine.submit((1, 2), asking(1))
        assert error.value.param == "echo"
