"""The plain path: greedy answers are those of `generate`, whatever kind of model it is."""

import itertools
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import AutoModelForSeq2SeqLM
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.errors import LoadFailed
from tests.support.tiny import IM_END
from tests.support.tiny import VOCAB

ANSWER = 16
CONTEXT = 160
# a window longer than the prompts by which the engine proves its fast path, and prompts beyond it
WINDOW = 40
LENGTHS = (3, 2 * WINDOW + 5, WINDOW + 3)

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": IM_END,
    "bos_token_id": IM_END,
    "eos_token_id": IM_END,
}
MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SSM = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
STATE = "it has a recurrent state"
# architecture -> its configuration, and why it is on the plain path
PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": (SSM, STATE),
    "falcon_mamba": (SSM, STATE),
    "mamba2": (
        {**SSM, "num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 8},
        STATE,
    ),
    "jamba": (
        {
            **BASE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
        STATE,
    ),
    "qwen3_next": (
        {
            **BASE,
            **EXPERTS,
            **LINEAR,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 64,
        },
        STATE,
    ),
    # these two count positions from a cache that does not know them
    "bamba": (
        {
            **BASE,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
        },
        STATE,
    ),
    "minimax": (
        {
            **BASE,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
            "num_local_experts": 4,
        },
        STATE,
    ),
    "rwkv": ({**SSM, "attention_hidden_size": 64, "context_length": 512}, STATE),
    "bloom": (
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.3,
        },
        "attention function of its own",
    ),
    "llama4_text": (
        {
            **BASE,
            "head_dim": 16,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 1,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "does not tell its window|has a window of 40 that its layers do not tell",
    ),
    "gpt_oss": (
        {
            **BASE,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": MIXED,
        },
        "passes s_aux",
    ),
    "phimoe": (
        {**BASE, "sliding_window": WINDOW, "num_local_experts": 4},
        "its mask has a window of 40 that its layers do not tell",
    ),
    "qwen2_moe": (
        {
            **BASE,
            **EXPERTS,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
            "shared_expert_intermediate_size": 64,
        },
        "its mask has a window of 40 that its layers do not tell",
    ),
}
RAGGED: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": MIXED},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "mistral": {"head_dim": 16},
    "cohere2": {"head_dim": 16, "layer_types": MIXED},
    "olmo3": {"layer_types": MIXED},
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "num_heads": 4,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "dropout_rate": 0.0,
}
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 512,
    "dropout": 0.0,
    "init_std": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
ANSWERING: dict[str, dict[str, Any]] = {
    "t5": T5,
    "umt5": T5,
    "bart": BART,
    "mbart": BART,
    "marian": {**BART, "decoder_start_token_id": 1, "init_std": 1.0},
    "pegasus": BART,
}


def unplaced(
    *, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return dict(inputs)


def made(arch: str, keys: dict[str, Any], kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = kind.from_config(CONFIG_MAPPING[arch](**keys)).eval()
    if kind is AutoModelForSeq2SeqLM:  # or it says one token for ever
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    return model


def prompt(length: int) -> list[int]:
    return [(i * 37 + 11) % 250 + 3 for i in range(length)]


@contextmanager
def running(model: PreTrainedModel, **given: Any) -> Iterator[tuple[Engine, Runner]]:
    runner = Runner(model, unplaced, **{"max_context": CONTEXT, "max_sequences": 3, **given})
    engine = Engine(runner, max_queue=8)
    engine.start()
    try:
        yield engine, runner
    finally:
        engine.close()


def stops(model: PreTrainedModel) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])


def answers(engine: Engine, model: PreTrainedModel) -> list[list[int]]:
    """Of all LENGTHS at once, greedy."""
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0, stop_ids=stops(model))
    found = []
    for stream in engine.submit_all([(prompt(length), params) for length in LENGTHS]):
        tokens: list[int] = []
        while more := stream.read(60):
            tokens += more
        found.append(tokens)
    return found


def generated(model: PreTrainedModel) -> list[list[int]]:
    """What transformers answers, up to the stop token."""
    found = []
    for length in LENGTHS:
        ids = torch.tensor([prompt(length)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=ANSWER,
        )[0].tolist()
        tokens = out[1:] if model.config.is_encoder_decoder else out[length:]
        end = next((at for at, token in enumerate(tokens) if token in stops(model)), len(tokens))
        found.append(tokens[:end])
    return found


@pytest.mark.parametrize("arch", PLAIN)
def test_a_model_that_the_fast_path_does_not_carry_answers_like_generate(arch: str) -> None:
    keys, _ = PLAIN[arch]
    model = made(arch, keys)
    expected = generated(model)
    with running(model) as (engine, _):
        assert engine.path == "plain"
        assert answers(engine, model) == expected


@pytest.mark.parametrize("arch", PLAIN)
def test_it_says_why(arch: str) -> None:
    keys, why = PLAIN[arch]
    with running(made(arch, keys), max_context=64) as (engine, runner):
        told = engine.describe()
        assert any(part in str(told["why"]) for part in why.split("|")), told
        assert "generate" not in str(told["why"])
        assert (told["path"], told["graphs"], told["kv_reserved"]) == ("plain", False, {})
        assert told["why"] == runner.path.why


@pytest.mark.parametrize("arch", RAGGED)
def test_layers_that_tell_their_window_are_right_beyond_it(arch: str) -> None:
    model = made(arch, {**BASE, "sliding_window": WINDOW, **RAGGED[arch]})
    expected = generated(model)
    with running(model) as (engine, _):
        told = engine.describe()
        assert (told["path"], told["why"], told["graphs"]) == ("ragged", "", False)
        assert told["kv_reserved"]
        assert answers(engine, model) == expected


@pytest.mark.parametrize("arch", ANSWERING)
def test_an_encoder_decoder_answers_like_generate(arch: str) -> None:
    model = made(arch, ANSWERING[arch], AutoModelForSeq2SeqLM)
    expected = generated(model)
    assert any(len(set(tokens)) > 1 for tokens in expected)
    with running(model) as (engine, runner):
        assert runner.path.why == "it is an encoder-decoder"
        assert answers(engine, model) == expected


def test_the_engine_says_nothing_of_a_path_before_it_starts_and_after_its_end() -> None:
    runner = Runner(made("mamba", SSM), unplaced, max_context=64)
    engine = Engine(runner, max_queue=1)
    nothing = dict.fromkeys(("path", "why", "graphs", "compiled", "kv_reserved", "hangs"))
    assert engine.describe() == nothing
    engine.start()
    engine.close()
    assert engine.describe() == nothing


# --- what generation_config.json demands


def test_forbidden_tokens_are_never_chosen() -> None:
    model = made("bart", BART, AutoModelForSeq2SeqLM)
    before = generated(model)
    model.generation_config.bad_words_ids = [[before[0][0]], [2]]  # 2 ends an answer: it may come
    model.generation_config.suppress_tokens = [before[1][1]]
    model.generation_config.begin_suppress_tokens = [before[2][0]]
    expected = generated(model)
    assert all(a != b for a, b in zip(expected, before, strict=True))
    with running(model) as (engine, _):
        assert answers(engine, model) == expected


def test_a_decoder_whose_files_forbid_tokens_leaves_the_fast_path() -> None:
    model = made("mistral", {**BASE, "sliding_window": None})
    before = generated(model)
    model.generation_config.suppress_tokens = [before[0][0]]
    with running(model) as (engine, runner):
        assert runner.path.why == "its generation_config.json forbids tokens"
        assert answers(engine, model) == generated(model) != before


@pytest.mark.parametrize(
    ("setting", "value"),
    [("bad_words_ids", [[5, 6]]), ("force_words_ids", [[5]]), ("guidance_scale", 2.0)],
)
def test_a_demand_that_is_not_followed_is_refused_by_name(setting: str, value: Any) -> None:
    model = made("t5", T5, AutoModelForSeq2SeqLM)
    setattr(model.generation_config, setting, value)
    with pytest.raises(LoadFailed, match=setting), running(model):
        pass


def test_the_first_decoder_token_is_the_one_of_the_generation_config() -> None:
    model = made("t5", T5, AutoModelForSeq2SeqLM)
    before = generated(model)
    model.generation_config.decoder_start_token_id = 9
    expected = generated(model)
    assert expected != before
    with running(model) as (engine, _):
        assert answers(engine, model) == expected


def test_a_decoder_without_a_first_token_is_refused() -> None:
    model = made("t5", {**T5, "decoder_start_token_id": None}, AutoModelForSeq2SeqLM)
    with pytest.raises(LoadFailed, match="which token its decoder begins with"), running(model):
        pass


def test_an_answer_begins_with_the_token_that_the_files_force() -> None:
    model = made("mbart", BART, AutoModelForSeq2SeqLM)
    model.generation_config.forced_bos_token_id = 77
    expected = generated(model)
    assert [tokens[0] for tokens in expected] == [77] * len(LENGTHS)
    with running(model) as (engine, _):
        assert answers(engine, model) == expected
        drawn = SamplingParams(max_tokens=1, temperature=1.0, seed=1)
        assert engine.submit(prompt(5), drawn).read(60) == [77]


# --- models that contradict themselves


def test_a_model_that_generate_cannot_run_is_its_own_measure() -> None:
    """transformers makes as many layers of cache as the encoder has."""
    model = made("t5", {**T5, "num_decoder_layers": 3}, AutoModelForSeq2SeqLM)
    with pytest.raises(IndexError):
        generated(model)
    with running(model) as (engine, runner):
        assert runner.path.why == "it is an encoder-decoder"
        first = answers(engine, model)[0]
    ids, begun = torch.tensor([prompt(LENGTHS[0])]), [0]
    with torch.inference_mode():
        for _ in first:
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([begun])).logits
            begun.append(int(logits[0, -1].argmax()))
    assert first == begun[1:] != []


def test_a_model_without_a_usable_cache_is_run_without_it() -> None:
    model = made("mistral", {**BASE, "sliding_window": None})
    expected = generated(model)
    model._is_stateful = True  # keeps it from the fast path
    forward = model.forward

    def forgetful(input_ids: torch.Tensor, position_ids: torch.Tensor, **given: Any) -> Any:
        # what `generate` calls is told by the mask it passes
        if input_ids.shape[1] == 1 and given.get("attention_mask") is None:
            given.pop("past_key_values", None)
        return forward(input_ids=input_ids, position_ids=position_ids, **given)

    model.forward = forgetful  # type: ignore[method-assign]
    with running(model) as (engine, runner):
        assert runner.path.why.endswith("without its cache, which gives other logits")
        assert answers(engine, model) == expected


REMOTE = '''
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class MineConfig(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=258, hidden_size=32, num_hidden_layers=1, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class Mine(PreTrainedModel, GenerationMixin):
    """Attends to the mean of all tokens so far, weighted by how long ago they were."""

    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None, **kwargs):
        x = self.embed(input_ids)
        places = torch.arange(x.shape[1], device=x.device)
        ago = places[:, None] - places[None]
        weights = torch.where(ago >= 0, 0.7 ** ago.clamp_min(0), 0.0).to(x.dtype)
        x = torch.sin(9 * (x + self.mix(weights @ x)))
        return CausalLMOutputWithPast(logits=40 * self.head(x))
'''


def test_a_model_of_ones_own_with_attention_of_its_own_answers_like_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "modeling_mine.py").write_text(REMOTE)
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "modeling_mine.MineConfig",'
        ' "AutoModelForCausalLM": "modeling_mine.Mine"}}'
    )
    from transformers import AutoConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    model.generation_config.use_cache = False  # it makes none
    expected = generated(model)
    assert len(set(itertools.chain(*expected))) > 3
    with running(model) as (engine, _):
        assert engine.path == "plain"
        assert answers(engine, model) == expected
