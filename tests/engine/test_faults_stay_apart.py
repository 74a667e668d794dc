"""What goes wrong with one sequence of a real model never reaches another one's tokens."""

import pytest
import torch
from transformers import PreTrainedModel

from service.engine import proof
from service.engine.params import SamplingParams
from service.errors import NonFiniteLogits
from service.errors import StepFailed
from tests.engine.models import CONTEXT
from tests.engine.models import engine_over
from tests.engine.models import generated
from tests.engine.models import model_of
from tests.engine.scripted import greedy
from tests.engine.scripted import read_all
from tests.support.tiny import IM_END
from tests.support.tiny import VOCAB

ARCHITECTURES = ("llama", "mistral", "gemma2", "gpt2")
# no token of the trial at the start, which would refuse the model
SICK = next(t for t in range(200, 256) if t not in proof.prompt_for(VOCAB, CONTEXT))


def sick_model(arch: str) -> PreTrainedModel:
    """A model that has no numbers for one token."""
    model = model_of(arch)
    with torch.no_grad():
        model.get_input_embeddings().weight[SICK] = float("nan")
        model.get_output_embeddings().weight[SICK] = 0.0
    return model


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_a_sequence_without_numbers_leaves_in_memory_harms_nobody(
    arch: str, paged: bool
) -> None:
    model = sick_model(arch)
    prompts = ((5, 5), tuple(range(10, 40)))
    expected = [generated(model, prompt, 12) for prompt in prompts]
    engine = engine_over(model, max_sequences=2, paged=paged, step_tokens=64)
    for stream in [engine.submit([SICK] * 40, greedy(4)) for _ in range(2)]:
        with pytest.raises(NonFiniteLogits):
            read_all(stream)
    # two at once in the same places, of unlike length
    streams = [engine.submit(prompt, greedy(12, stop_ids=[IM_END])) for prompt in prompts]
    answers = [read_all(stream) for stream in streams]
    engine.close()
    assert answers == expected


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_that_failed_late_is_run_again_as_if_it_had_not_been_run(
    arch: str, paged: bool
) -> None:
    """The keys and values of both sequences are written by the time it fails."""
    model = model_of(arch)
    # ends four tokens behind the first step, so that what matters is computed in the second
    prompt = tuple(range(30, 97))
    expected = generated(model, prompt, 20)
    engine = engine_over(model, max_sequences=2, paged=paged, step_tokens=64)
    guilty = [False]

    def look(module: torch.nn.Module, args: object, inputs: dict[str, torch.Tensor]) -> None:
        guilty[0] = SICK in inputs["input_ids"].flatten().tolist()

    def fail(module: torch.nn.Module, args: object, output: object) -> None:
        if guilty[0]:
            raise RuntimeError("device lost")

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.get_output_embeddings().register_forward_hook(fail)
    says_it = SamplingParams(max_tokens=4, temperature=0.0, logit_bias=((SICK, 100.0),))
    bad, good = engine.submit([5], says_it), engine.submit(prompt, greedy(20, stop_ids=[IM_END]))
    with pytest.raises(StepFailed):
        read_all(bad)
    answer = read_all(good)
    engine.close()
    assert bad.completion_tokens == 1
    assert answer == expected
