"""Checks of a model folder before anything is loaded from it.

`from_pretrained` loads a folder with a missing tensor, an index that names files outside it, or
flipped bytes without an error. Everything found here is a ModelUnavailable that names the file and
the way out.
"""

import hashlib
import json
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from pathlib import PurePosixPath
from typing import Any

from service.errors import ModelUnavailable
from service.models import headers as safetensors_headers
from service.models.headers import TensorInfo

MANIFEST = "moorage.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("spm.model",),
    ("tokenizer.tiktoken",),
    ("tekken.json",),
)
BYTE_TOKENIZERS = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
LARGEST_JSON_BYTES = 256 * 2**20


def check(folder: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> None:
    """Refuse a folder that would not load, would load wrongly, or would run code nobody asked for.

    Reads config, tokenizer and safetensors headers; weights only if the folder has a manifest with
    their SHA-256. Raises ModelUnavailable naming the file.
    """
    config = check_config(folder, trust_remote_code=trust_remote_code)
    if not _has_safetensors(folder):
        _refuse_pickle(folder, allow_pickle)
    else:
        headers(folder)
    _check_tokenizer(folder, config, trust_remote_code)
    check_manifest(folder)


def check_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The folder's config.json, checked: what a plan needs. Raises ModelUnavailable."""
    if not folder.is_dir():
        raise ModelUnavailable(
            f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}",
            hint="give the folder that holds config.json and model.safetensors",
        )
    if not (folder / "config.json").exists():
        raise ModelUnavailable(f"{folder}: has no config.json", hint=_instead_of_config(folder))
    config = read_json(folder, "config.json")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelUnavailable(
            f"{folder / 'config.json'}: has no model_type",
            hint='add the architecture, for example "model_type": "llama"',
        )
    names = config.get("architectures", [])
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise ModelUnavailable(
            f"{folder / 'config.json'}: architectures is {names!r:.60}",
            hint='give a list of class names, for example ["LlamaForCausalLM"]',
        )
    if config.get("auto_map") and not trust_remote_code and not _known(config["model_type"]):
        raise _custom_code(folder, "config.json", config["auto_map"])
    return config


def headers(folder: Path) -> Mapping[str, TensorInfo]:
    """Every tensor of the folder's safetensors files by name, read from the headers only.

    Follows transformers: model.safetensors if it is there, else the files of the index. Empty for a
    folder without safetensors. Raises ModelUnavailable for a damaged file, a missing or outside
    shard, or a tensor that the index names and its file lacks.
    """
    if _inside(folder, WEIGHTS).is_file():
        tensors = safetensors_headers.read(folder / WEIGHTS, str(folder / WEIGHTS))
        return {name: _named(info, WEIGHTS) for name, info in tensors.items()}
    if not (folder / INDEX).is_file():
        return {}
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelUnavailable(
            f"{folder / INDEX}: has no weight_map of tensor names to file names",
            hint=safetensors_headers.AGAIN,
        )
    found: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        path = _inside(folder, shard, named_by=INDEX)
        if not path.is_file():
            raise ModelUnavailable(
                f"{folder / shard}: missing, though {INDEX} names it",
                hint="download or copy that file too",
            )
        tensors = safetensors_headers.read(path, str(path))
        found |= {name: _named(info, shard) for name, info in tensors.items()}
        lost = [n for n, f in weight_map.items() if f == shard and n not in tensors]
        if lost:
            raise ModelUnavailable(
                f"{path}: lacks {lost[0]}{_more(lost)}, which {INDEX} says is in it",
                hint=safetensors_headers.AGAIN,
                tensors=lost,
            )
    return {name: found[name] for name in weight_map}


def check_manifest(folder: Path) -> None:
    """Compare every file with the SHA-256 in moorage.json, if there is one."""
    if not (folder / MANIFEST).is_file():
        return
    files = read_json(folder, MANIFEST).get("files")
    if not isinstance(files, dict):
        raise ModelUnavailable(
            f"{folder / MANIFEST}: has no files", hint="delete it, or fetch again"
        )
    for name, expected in files.items():
        path = _inside(folder, name, named_by=MANIFEST)
        try:
            size, digest = path.stat().st_size, sha256(path)
        except OSError as error:
            raise safetensors_headers.unreadable(str(path), error) from None
        if {"bytes": size, "sha256": digest} != expected:
            raise ModelUnavailable(
                f"{path}: differs from the SHA-256 in {MANIFEST}; it is damaged or was changed",
                hint=f"fetch or copy it again, or delete {MANIFEST} if you changed it yourself",
            )


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the folder. Raises ModelUnavailable with the line."""
    value = read_any_json(folder, name)
    if not isinstance(value, dict):
        raise ModelUnavailable(
            f"{folder / name}: holds a {type(value).__name__}, not a JSON object",
            hint=safetensors_headers.AGAIN,
        )
    return value


def read_any_json(folder: Path, name: str) -> Any:
    """What a JSON file of the folder holds. Raises ModelUnavailable with the line."""
    path = _inside(folder, name)
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise ModelUnavailable(
                f"{path}: {path.stat().st_size:,} bytes is too large for JSON",
                hint=safetensors_headers.AGAIN,
            )
        value: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise safetensors_headers.unreadable(str(path), error) from None
    except json.JSONDecodeError as error:
        raise ModelUnavailable(
            f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}",
            hint=safetensors_headers.AGAIN,
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(
            f"{path}: not JSON: {error}", hint=safetensors_headers.AGAIN
        ) from None
    return value


def pickles(folder: Path) -> list[str]:
    """Names of pickled weight files in the folder, the likeliest first."""
    seen: dict[str, None] = {}
    for pattern in PICKLES:
        seen |= dict.fromkeys(sorted(path.name for path in folder.glob(pattern)))
    return [name for name in seen if name not in ("training_args.bin", "optimizer.pt")]


def _inside(folder: Path, name: str, named_by: str = "") -> Path:
    """The file of that name, refused if it is not below the folder once links are followed.

    The hub's cache keeps a snapshot's files as links into `blobs` two folders up; those are
    allowed.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise ModelUnavailable(
            f"{folder / named_by}: names {name!r}, which is outside the folder",
            hint="an index may name only files beside it; do not load this folder",
        )
    path, root = folder / name, folder.resolve()
    real = path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelUnavailable(
            f"{path}: is a link to {real}, outside the folder",
            hint="copy the file into the folder, or give the folder the file is really in",
        )
    return path


def _named(info: TensorInfo, file: str) -> TensorInfo:
    return TensorInfo(file, info.dtype, info.shape, info.bytes)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _has_safetensors(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def _refuse_pickle(folder: Path, allow_pickle: bool) -> None:
    """No safetensors that transformers would find: say what is there instead."""
    found = pickles(folder)
    if found and allow_pickle:
        _check_pickles(folder)
        return
    if found:
        raise ModelUnavailable(
            f"{folder / found[0]}: the weights are pickled, and unpickling can run any code",
            hint="convert once where you trust it: python -c 'from transformers import "
            f'AutoModelForCausalLM as M; M.from_pretrained("{folder}", use_safetensors=False)'
            f'.save_pretrained("{folder}-safe")\' and copy the tokenizer files; '
            "or set allow_pickle: true",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise ModelUnavailable(
            f"{folder}: has {others[0]}{_more(others)}, but neither {WEIGHTS} nor {INDEX}",
            hint=f"rename a single file to {WEIGHTS}, or add the index that belongs to the shards",
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        raise ModelUnavailable(
            f"{folder}: has no safetensors weights", hint=f"name the file: {folder}:{ggufs[0]}"
        )
    raise ModelUnavailable(
        f"{folder}: has no weights ({WEIGHTS}, or {INDEX} with its shards)",
        hint="download or copy the weights into the folder",
    )


def _check_pickles(folder: Path) -> None:
    index = PICKLES[0]
    if (folder / PICKLES[1]).is_file() or not (folder / index).is_file():
        return
    weight_map = read_json(folder, index).get("weight_map")
    for shard in sorted(
        {str(f) for f in weight_map.values()} if isinstance(weight_map, dict) else ()
    ):
        if not _inside(folder, shard, named_by=index).is_file():
            raise ModelUnavailable(
                f"{folder / shard}: missing, though {index} names it",
                hint="download or copy that file too",
            )


def _instead_of_config(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return "this is an adapter; merge it into its base model first (peft: merge_and_unload)"
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"for a GGUF file name it: {folder}:{ggufs[0]}"
    below = sorted(path.parent for path in folder.glob("*/config.json"))
    if below:
        return f"did you mean {below[0]}?"
    return "give the folder that holds config.json and model.safetensors"


def _known(model_type: str) -> bool:
    """Whether transformers has this architecture itself and so leaves the folder's code alone."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _code_files(auto_map: Any) -> Iterator[str]:
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and "." in reference:
                yield reference.rpartition("--")[2].rpartition(".")[0] + ".py"


def _custom_code(folder: Path, file: str, auto_map: Any) -> ModelUnavailable:
    names = ", ".join(sorted(set(_code_files(auto_map)))) or "its own Python files"
    return ModelUnavailable(
        f"{folder / file}: auto_map wants to run code from the folder ({names})",
        hint="read that code, then set trust_remote_code: true; or use a model that "
        "transformers knows",
    )


def _check_tokenizer(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").exists():
        settings = read_json(folder, "tokenizer_config.json")
    if settings.get("auto_map") and not trust_remote_code and not _known(str(config["model_type"])):
        raise _custom_code(folder, "tokenizer_config.json", settings["auto_map"])
    if settings.get("tokenizer_class") in BYTE_TOKENIZERS:
        return
    present = next((s for s in TOKENIZERS if all((folder / n).exists() for n in s)), None)
    if present is None and not (trust_remote_code and settings.get("auto_map")):
        raise ModelUnavailable(
            f"{folder}: has no tokenizer",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        )
    for name in present or ():
        if name.endswith(".json"):
            read_json(folder, name)
        elif not _inside(folder, name).stat().st_size:
            raise ModelUnavailable(f"{folder / name}: is empty", hint=safetensors_headers.AGAIN)
