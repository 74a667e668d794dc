"""GGUF files: read from the header, named in a config, converted into a safetensors folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.config.schema import Config
from service.errors import ModelUnavailable
from service.models import convert
from service.models import folder
from service.models import gguf_file
from service.models.catalogue import CATALOGUE
from service.models.catalogue import Entry
from service.models.locate import locate
from service.placement import planning
from service.placement.tensors import nbytes
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.tiny import CHATML
from tests.support.tiny import tiny_model
from tests.support.tiny import tiny_tokenizer

MakeConfig = Callable[..., Config]
VOCAB = 259
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.gguf as llama.cpp writes it: a tied llama with tokenizer and chat template."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_gguf(path: Path, quantise: str | None = None) -> Path:
    """quantise: GGUF's name of a block format for the matrices, for example Q8_0."""
    import gguf as library
    from gguf import quants

    model = tiny_model("llama", tie=True, vocab_size=VOCAB)
    config, tokenizer = model.config, tiny_tokenizer()
    writer = library.GGUFWriter(path, "llama")
    writer.add_name("An odd name")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*tokenizer.convert_ids_to_tokens(list(range(VOCAB - 1))), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(CHATML)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        data = tensor.float()
        if (
            count := heads.get(name.split(".")[-2])
        ) is not None:  # llama.cpp interleaves rotary halves
            data = data.reshape(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if quantise is None or data.ndim < 2:
            writer.add_tensor(name, data.contiguous().numpy())
        else:
            kind = library.GGMLQuantizationType[quantise]
            packed = quants.quantize(data.contiguous().numpy(), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def entry(gguf: Path) -> Entry:
    config = json.loads(tiny_model("llama", tie=True, vocab_size=VOCAB).config.to_json_string())
    return replace(
        CATALOGUE["smollm2-135m"],
        members={"wheel/tiny.gguf": gguf.name},
        gguf=gguf.name,
        config={**config, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]},
    )


def test_a_plan_counts_what_a_quantised_gguf_file_becomes(tmp_path: Path) -> None:
    """transformers dequantises it: 8 bits in the file, 32 in memory."""
    path = write_gguf(tmp_path / "q8.gguf", "Q8_0")
    config = model_config(tmp_path, gguf_file=path.name, dtype="float32")
    made = planning.on_one_device(config, ram(2**30), "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **made.load_kwargs)
    held = sum(nbytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
    assert made.memory["cpu"].weights == held > 2 * path.stat().st_size
    (note,) = made.notes
    assert note.startswith("q8.gguf (")
    assert note.endswith("MiB in float32.")


def test_the_header_gives_every_tensor_in_torchs_order_of_dimensions(gguf: Path) -> None:
    found = gguf_file.read(gguf)
    assert len(found) == 2 + 2 * 9
    assert found["token_embd.weight"].shape == (VOCAB, 64)
    assert (found["token_embd.weight"].dtype, found["token_embd.weight"].bytes) == (
        "F32",
        VOCAB * 64 * 4,
    )


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:100], "truncated in its header"),
        (lambda data: b"", "not a GGUF file"),
        (lambda data: b"<html>", "not a GGUF file"),
        (lambda data: data[:4] + b"\x09" + data[5:], "GGUF version 9"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "malformed header"),
    ],
)
def test_a_damaged_gguf_file_is_named(
    gguf: Path, tmp_path: Path, damage: Callable[[bytes], bytes], fact: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(damage(gguf.read_bytes()))
    with pytest.raises(ModelUnavailable, match=fact) as caught:
        gguf_file.read(path)
    assert "m.gguf: " in caught.value.message


def test_a_gguf_file_is_named_by_folder_and_file_or_by_its_path(
    gguf: Path, make_config: MakeConfig
) -> None:
    for words in (f"{gguf.parent}:tiny.gguf", str(gguf)):
        found = locate(make_config(model=words))
        assert (found.folder, found.gguf_file, found.model_id) == (gguf.parent, "tiny.gguf", "tiny")


def test_a_missing_gguf_file_lists_the_others(gguf: Path, make_config: MakeConfig) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no other\.gguf") as caught:
        locate(make_config(model=f"{gguf.parent}:other.gguf"))
    assert caught.value.hint == "it has tiny.gguf"


@pytest.mark.parametrize("words", [":a.gguf", "x:../a.gguf", "x:/a.gguf"])
def test_a_gguf_file_stays_inside_its_folder(words: str, make_config: MakeConfig) -> None:
    with pytest.raises(ModelUnavailable, match="does not name a file inside"):
        locate(make_config(model=words))


def test_a_converted_model_gives_the_same_logits_in_bfloat16(
    gguf: Path, entry: Entry, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    out.mkdir()
    shares: list[float] = []
    convert.to_safetensors(gguf.parent, entry, out, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert capfd.readouterr() == ("", ""), "no bars and no warnings on the terminal"
    (out / "config.json").write_text(json.dumps(entry.config))
    folder.check(out)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    assert {info.dtype for info in folder.headers(out).values()} == {"BF16"}

    made = AutoModelForCausalLM.from_pretrained(out)
    assert made.lm_head.weight is made.model.embed_tokens.weight, "tied embeddings stay tied"
    ids = torch.arange(20).reshape(1, 20)
    expected = tiny_model("llama", tie=True, dtype=torch.bfloat16, vocab_size=VOCAB)(ids).logits
    torch.testing.assert_close(made(ids).logits, expected)

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.model_max_length == 512
    assert "An odd name" not in "".join(p.read_text() for p in out.glob("*.json"))
    text = "a  12 b"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.e2e
@pytest.mark.slow
def test_the_embedded_default_knows_the_capital_of_france(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    from service.models import fetch

    path = fetch.fetch("smollm2-135m", tmp_path, lambda stage, fraction: None)
    entry = CATALOGUE["smollm2-135m"]
    assert sum(info.bytes for info in folder.headers(path).values()) == 2 * entry.parameters
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("a  6 12").tokens() == ["a", "ĠĠ", "6", "Ġ", "1", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][inputs["input_ids"].shape[1] :])
