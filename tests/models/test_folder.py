"""A damaged or dangerous model folder is refused before anything is loaded, by file name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelUnavailable
from service.models import folder

INDEX = folder.INDEX


def refused(path: Path, **switches: bool) -> str:
    """The one-line message with which the folder is refused."""
    with pytest.raises(ModelUnavailable) as caught:
        folder.check(path, **switches)
    assert caught.value.hint
    return caught.value.one_line()


def write_header(path: Path, header: Any, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same model, its weights in two files with an index."""
    from safetensors.torch import load_file
    from safetensors.torch import save_file

    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / shard)
        weight_map |= dict.fromkeys(part, shard)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "model.safetensors").unlink()
    return model


def test_a_sound_folder_passes(model: Path) -> None:
    folder.check(model)


def test_a_sound_sharded_folder_passes(sharded: Path) -> None:
    folder.check(sharded)


def test_headers_say_shape_dtype_and_bytes_of_every_tensor(model: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    headers = folder.headers(model)
    assert set(headers) == set(tensors)
    for name, info in headers.items():
        tensor = tensors[name]
        assert (info.shape, info.bytes) == (tuple(tensor.shape), tensor.nbytes)
        assert (info.file, info.dtype) == ("model.safetensors", "F32")


def test_headers_of_shards_name_the_shard(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert {name: info.file for name, info in folder.headers(sharded).items()} == weight_map


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "nowhere: no such folder" in refused(tmp_path / "nowhere")


def test_a_file_is_not_a_folder(model: Path) -> None:
    assert "model.safetensors: is not a folder" in refused(model / "model.safetensors")


def test_a_missing_config_points_to_the_folder_below_that_has_one(model: Path) -> None:
    message = refused(model.parent)
    assert "has no config.json" in message
    assert f"did you mean {model}?" in message


def test_an_adapter_is_not_a_model(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in refused(model)


def test_a_broken_config_names_line_and_column(model: Path) -> None:
    (model / "config.json").write_text('{\n  "model_type": llama\n}')
    assert "config.json:2:17: not JSON" in refused(model)


@pytest.mark.parametrize("text", ["[]", '"llama"', "7", "\xff", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json: " in refused(model)


@pytest.mark.parametrize("value", [None, "", 7])
def test_a_config_without_model_type_is_refused(model: Path, value: object) -> None:
    edit(model / "config.json", model_type=value)
    assert "config.json: has no model_type" in refused(model)


def test_architectures_must_be_names(model: Path) -> None:
    edit(model / "config.json", architectures="LlamaForCausalLM")
    assert "architectures is 'LlamaForCausalLM'" in refused(model)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_weight_file_is_named(model: Path, kept: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: truncated" in refused(model)


def test_bytes_after_the_last_tensor_are_refused(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "model.safetensors: 4 bytes after the last tensor" in refused(model)


def test_a_pointer_file_in_place_of_weights_is_recognised(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    assert "git-lfs pointer" in refused(model)


def test_a_header_that_claims_gigabytes_is_not_read(model: Path) -> None:
    (model / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "not a safetensors file" in refused(model)


@pytest.mark.parametrize(
    ("header", "fact"),
    [
        ([], "the header is not a JSON object"),
        ({"a": 1}, "tensor a has a malformed entry"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "tensor a has a malformed entry"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "not what F32 [2] needs"),
        ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "ends at byte 36 of 8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "overlap or leave a gap"),
    ],
)
def test_a_malformed_header_names_the_file_and_the_tensor(
    model: Path, header: Any, fact: str
) -> None:
    write_header(model / "model.safetensors", header, bytes(8))
    message = refused(model)
    assert "model.safetensors: " in message
    assert fact in message


def test_a_tensor_named_twice_is_refused(model: Path) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f'{{"a":{entry},"a":{entry}}}'.encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    assert "a name occurs twice" in refused(model)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = refused(sharded)
    assert "model-00002-of-00002.safetensors: missing" in message


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model-00002-of-00002.safetensors: truncated" in refused(sharded)


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    edit(
        sharded / INDEX,
        weight_map={**index["weight_map"], "ghost": "model-00001-of-00002.safetensors"},
    )
    assert "model-00001-of-00002.safetensors: lacks ghost" in refused(sharded)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b", "", "..\\b"])
def test_an_index_may_not_name_a_file_outside(sharded: Path, name: str) -> None:
    edit(sharded / INDEX, weight_map={"a": name})
    message = refused(sharded)
    assert INDEX in message
    assert repr(name) in message


@pytest.mark.parametrize("value", [None, [], {"a": 7}])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, value: object) -> None:
    edit(sharded / INDEX, weight_map=value)
    assert f"{INDEX}: has no weight_map" in refused(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(model: Path, name: str) -> None:
    outside = model.parent / "elsewhere"
    (model / name).rename(outside)
    (model / name).symlink_to(outside)
    assert f"{name}: is a link to {outside}" in refused(model)


def test_the_links_of_the_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(model.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    folder.check(snapshot)


def test_a_folder_that_is_itself_a_link_is_fine(model: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(model)
    folder.check(tmp_path / "alias")


def test_pickled_weights_are_refused_with_a_way_to_convert(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = refused(model)
    assert "pytorch_model.bin: the weights are pickled" in message
    assert "save_pretrained" in message
    assert "allow_pickle: true" in message
    folder.check(model, allow_pickle=True)


def test_safetensors_beside_pickles_are_what_counts(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"anything")
    folder.check(model)


def test_weights_under_a_name_nobody_looks_for(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert "rename a single file to model.safetensors" in refused(model)


def test_a_folder_with_only_gguf_says_how_to_name_it(model: Path) -> None:
    (model / "model.safetensors").rename(model / "m.gguf")
    assert f"name the file: {model}:m.gguf" in refused(model)


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "has no weights" in refused(model)


def test_code_from_the_folder_is_refused_unless_trusted(model: Path) -> None:
    edit(
        model / "config.json",
        model_type="my-own",
        auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"},
    )
    message = refused(model)
    assert "config.json: auto_map wants to run code from the folder (modeling_mine.py)" in message
    assert "trust_remote_code: true" in message
    folder.check(model, trust_remote_code=True)


def test_code_of_an_architecture_that_transformers_has_is_never_run_and_so_allowed(
    model: Path,
) -> None:
    edit(model / "config.json", auto_map={"AutoConfig": "configuration_mine.Mine"})
    folder.check(model)


def test_code_of_the_tokenizer_is_refused_too(model: Path) -> None:
    edit(model / "config.json", model_type="my-own")
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Mine", None]})
    assert "tokenizer_config.json: auto_map wants to run code" in refused(model)


def test_a_folder_without_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(model)


def test_a_cut_tokenizer_is_named(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:100])
    assert "tokenizer.json:" in refused(model)


def test_a_byte_tokenizer_needs_no_vocabulary(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    edit(model / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    folder.check(model)


def test_a_manifest_catches_a_flipped_byte(model: Path) -> None:
    path = model / "model.safetensors"
    size, digest = path.stat().st_size, folder.sha256(path)
    listed = {"model.safetensors": {"bytes": size, "sha256": digest}}
    (model / folder.MANIFEST).write_text(json.dumps({"files": listed}))
    folder.check(model)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "model.safetensors: differs from the SHA-256 in moorage.json" in refused(model)


def test_a_manifest_may_not_name_a_file_outside(model: Path) -> None:
    (model / folder.MANIFEST).write_text(json.dumps({"files": {"../secret": {}}}))
    assert "moorage.json: names '../secret'" in refused(model)


def test_checking_imports_no_torch(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from service.models import folder, locate, fetch; "
        f"folder.check(Path({str(model)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
