"""Several answers, logprobs and scored prompts, as official clients and lm-eval ask for them."""

import openai
import pytest

from tests.support.server import Server

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url()}/v1", api_key="none", max_retries=0)


def test_two_answers_with_their_logprobs(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.content == "The capital of France is Paris."
        told = choice.logprobs.content
        assert "".join(token.token for token in told) == choice.message.content
        assert all(token.logprob == token.top_logprobs[0].logprob for token in told)
        assert bytes(told[-2].bytes) == b" Paris"
    assert answer.usage.completion_tokens == 2 * len(told)


def test_a_stream_of_two_answers_with_usage_and_what_was_found_computed(client: openai.OpenAI):
    texts, reasons, last = ["", ""], {}, None
    with client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        n=2,
        stream=True,
        logprobs=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            last = chunk
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
    assert texts == ["The capital of France is Paris."] * 2
    assert reasons == {0: "stop", 1: "stop"}
    assert last.choices == []
    # the question of the test before
    assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens - 1


def loglikelihood(client: openai.OpenAI, context: str, continuation: str) -> tuple[float, bool]:
    """What lm-eval makes of an answer of /v1/completions, with its own arguments."""
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    answer = client.completions.create(prompt=context + continuation, echo=True, **asked)
    begun = client.completions.create(prompt=context, echo=True, **asked).choices[0].logprobs
    length = len(begun.tokens) - 1
    found = answer.choices[0].logprobs
    logprobs = found.token_logprobs[length:-1]
    tops = found.top_logprobs[length:-1]
    greedy = all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True))
    return sum(logprobs), greedy


def test_the_loglikelihood_of_lm_eval_knows_paris(client: openai.OpenAI):
    paris, greedy = loglikelihood(client, "The capital of France is", " Paris")
    oslo, _ = loglikelihood(client, "The capital of France is", " Oslo")
    assert greedy
    assert oslo < paris < 0


def test_an_end_right_after_the_prompt_costs_no_score(client: openai.OpenAI):
    """The one token that is asked for ends the answer: it is told all the same."""
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>"
    answer = client.completions.create(
        model=MODEL, prompt=prompt[: -len("<|im_end|>")], echo=True, logprobs=1, max_tokens=1,
        temperature=0, logit_bias={"2": 100},
    )  # fmt: skip
    found = answer.choices[0].logprobs
    assert answer.choices[0].finish_reason == "stop"
    assert found.tokens[-1] == "<|im_end|>"
    assert "".join(found.tokens[:-1]) == answer.choices[0].text
