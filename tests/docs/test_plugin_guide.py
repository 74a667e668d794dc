"""docs/plugin-guide.md: every piece of code does what the text around it says.

Its commands are run by test_commands.py. A piece replaces or joins functions of the first one.
"""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from service.config import reading
from service.config.flags import Flags
from service.errors import DoesNotFit
from service.errors import PlacementMismatch
from service.errors import PlacementUnavailable
from service.placement import registry
from service.placement.certificate import certify
from service.placement.plan import device_of
from service.placement.registry import Strategy
from tests.docs.blocks import ROOT
from tests.docs.blocks import Block
from tests.docs.blocks import blocks
from tests.support.planned import GIB
from tests.support.planned import bring_up
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.tiny import save_tiny

PAGE = ROOT / "docs" / "plugin-guide.md"
ALL = list(blocks(PAGE))
CODE = [block for block in ALL if block.language == "python"]
FIRST, *PIECES = [block for block in CODE if "TestLastGpu" not in block.text]
CONTRACTS = [block for block in CODE if "StrategyContract" in block.text]
PIECES = [block for block in PIECES if block not in CONTRACTS]
NEW = ROOT / "service" / "cli" / "new_strategy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "m", layers=4)


def strategy(folder: Path, *pieces: Block) -> Strategy:
    """The strategy of the first block and these pieces, as `last_gpu.py` of a folder."""
    folder.mkdir(exist_ok=True)
    text = "\n\n".join(block.text for block in (FIRST, *pieces))
    (folder / "last_gpu.py").write_text(text)
    return registry.build([folder]).select("last-gpu")


def piece(words: str) -> Block:
    (found,) = (block for block in PIECES if words in block.text)
    return found


def settled(made: Strategy, folder: Path, **changes: Any) -> Any:
    return registry.settle(model_config(folder, **changes), made, {})


# --- the first lines


def test_the_first_lines_are_those_of_the_readme_and_few():
    assert FIRST.text in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len([line for line in FIRST.text.splitlines() if line.strip()]) <= 22


def without_docstrings(text: str) -> str:
    tree = ast.parse(text)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        if ast.get_docstring(function) is not None:
            del function.body[0]
    return ast.unparse(tree)


def test_the_command_writes_the_first_lines_and_their_tests():
    module = (NEW / "my_strategy.py.txt").read_text()
    assert without_docstrings(module) == without_docstrings(FIRST.text)
    tests = (NEW / "test_my_strategy.py.txt").read_text()
    as_here = tests.replace("my_strategy", "last_gpu").replace("MyStrategy", "LastGpu")
    assert as_here == CONTRACTS[0].text


# --- the pieces


@pytest.mark.parametrize("block", [FIRST, *PIECES], ids=lambda block: f"line {block.line}")
def test_every_piece_makes_a_strategy_that_loads_and_is_proven(
    tmp_path: Path, folder: Path, block: Block
):
    made = strategy(tmp_path / "s", *([] if block is FIRST else [block]))
    config = settled(made, folder)
    if "needs two GPUs" in block.text:
        with pytest.raises(PlacementUnavailable, match="and there are 0"):
            made.plan(config, ram(GIB))
        return
    assert certify(bring_up(made, config, ram(GIB))).valid


@pytest.mark.parametrize("arch", ["gpt2", "t5", "bert"])
def test_the_first_lines_load_what_is_no_llama(tmp_path: Path, arch: str):
    from transformers import AutoModelForCausalLM
    from transformers import AutoModelForMaskedLM
    from transformers import AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from tests.support.tiny import tiny_tokenizer

    kinds = {
        "gpt2": AutoModelForCausalLM,
        "t5": AutoModelForSeq2SeqLM,
        "bert": AutoModelForMaskedLM,
    }
    keys = {"vocab_size": 258, "num_hidden_layers": 2, "pad_token_id": 257, "hidden_size": 64}
    heads = {"num_attention_heads": 4, "intermediate_size": 128}
    t5 = {"vocab_size": 258, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16}
    more = {"d_ff": 128, "decoder_start_token_id": 257, "pad_token_id": 257}
    config = CONFIG_MAPPING[arch](**({**t5, **more} if arch == "t5" else {**keys, **heads}))
    model = kinds[arch].from_config(config)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    made = strategy(tmp_path / "s")
    assert certify(bring_up(made, settled(made, tmp_path / "m"), ram(GIB))).valid


def test_the_option_counts_from_the_last_gpu(tmp_path: Path, folder: Path):
    made = strategy(tmp_path / "s", piece("class Options"))
    config = settled(made, folder, options={"from_last": 1})
    assert made.plan(config, cards(24 * GIB, 24 * GIB)).devices == ("cuda:0",)
    with pytest.raises(PlacementUnavailable, match="from_last is 1, and there are 1 GPUs"):
        made.plan(config, cards(24 * GIB))


def test_two_gpus_get_a_half_each_of_weights_and_kv(tmp_path: Path):
    folder = save_tiny(tmp_path / "m", layers=12)
    made = strategy(tmp_path / "s", piece("needs two GPUs"))
    for context in (64, 512):
        config = settled(made, folder, max_context=context, max_sequences=16)
        placement = made.plan(config, cards(24 * GIB, 24 * GIB))
        first, second = (
            placement.memory[d].weights + placement.memory[d].kv for d in ("cuda:0", "cuda:1")
        )
        assert 0.6 < first / second < 1.7
        assert device_of("model.layers.11", placement.module_map) == "cuda:1"


def test_offload_is_only_in_need_and_only_if_it_is_allowed(tmp_path: Path, folder: Path):
    made = strategy(tmp_path / "s", piece("on_no_fit"))
    plain = settled(made, folder)
    assert made.plan(plain, ram(GIB)).allows == frozenset()
    whole = made.plan(plain, ram(GIB)).memory["cpu"].total
    little = {"max_memory": {"cpu": whole - 1}}
    with pytest.raises(DoesNotFit):
        made.plan(settled(made, folder, **little), ram(GIB))
    allowed = settled(made, folder, on_no_fit="offload-disk", **little)
    loaded = bring_up(made, allowed, ram(GIB))
    assert loaded.placement.allows == {"offload"}
    assert device_of("model.layers.3", loaded.placement.module_map) == "disk"
    assert certify(loaded).valid


def test_defaults_are_the_operators_to_change(tmp_path: Path, folder: Path):
    made = strategy(tmp_path / "s", piece("DEFAULTS = "))
    assert made.defaults == {"quantize": "nf4", "keep_free": {"cuda": GIB}}
    assert settled(made, folder).quantize == "nf4"


def test_validate_refuses_what_it_says(tmp_path: Path, folder: Path):
    made = strategy(tmp_path / "s", piece("the head is in 4 bits"))
    loaded = bring_up(made, settled(made, folder, quantize="nf4"), ram(GIB))
    made.validate(loaded.model, loaded.placement)
    loaded.model.lm_head = loaded.model.get_submodule("model.layers.0.mlp.up_proj")
    with pytest.raises(PlacementMismatch):
        made.validate(loaded.model, loaded.placement)


def test_release_undoes_what_load_did(tmp_path: Path, folder: Path):
    made = strategy(tmp_path / "s", piece("def release"))
    config = settled(made, folder)
    loaded = bring_up(made, config, ram(GIB))
    assert (config.offload_folder / "in-use").read_text() == "tiny"
    made.release(loaded.model)
    assert not (config.offload_folder / "in-use").exists()


# --- configs, words and files


@pytest.mark.parametrize(
    "block", [b for b in ALL if b.language == "yaml"], ids=lambda b: f"line {b.line}"
)
def test_every_config_is_one(tmp_path: Path, block: Block):
    (tmp_path / "last-gpu").mkdir()
    (tmp_path / "moorage.yaml").write_text(block.text)
    config = reading.load(tmp_path / "moorage.yaml", {}, Flags())
    assert config.deployment.strategy == "last-gpu"
    assert not config.notices


def test_the_second_class_of_tests_is_one_too(tmp_path: Path):
    text = CONTRACTS[0].text + "\n\n" + CONTRACTS[1].text
    assert {"settings", "hardware"} <= set(re.findall(r"^    (\w+) =", text, re.MULTILINE))
    compile(text, "test_last_gpu.py", "exec")


@pytest.mark.parametrize("path", re.findall(r"`(examples/[\w/]+\.py)`", PAGE.read_text()))
def test_every_example_that_is_named_is_there(path: str):
    assert (ROOT / path).is_file()
