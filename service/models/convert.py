"""A GGUF file, converted once into a safetensors folder in bfloat16.

Loading a GGUF file unpacks every weight, which takes half a minute; the converted folder loads in
two seconds.
"""

import contextlib
import io
import json
import re
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

from service.models.catalogue import Entry

PERCENT = re.compile(r"\b(\d{1,3})%\|")


def to_safetensors(
    source: Path, entry: Entry, target: Path, report: Callable[[float], None]
) -> None:
    """Convert `source / entry.gguf` into the folder `target`, with its tokenizer.

    report: told how much of the file has been read, 0 to 1, which is most of the work. Nothing is
    written to the terminal. Raises whatever transformers raises for a file it cannot read.
    """
    with _quiet(report):
        _convert(source, entry, target)
    for path in target.iterdir():
        path.chmod(0o644)  # save_pretrained writes weights that only their owner can read


def _convert(source: Path, entry: Entry, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer
    from transformers import GenerationConfig

    # Newer releases can leave the weights in GGUF's own blocks; those cannot be safetensors.
    settings = getattr(transformers, "GgufConfig", None)
    unpack = {} if settings is None else {"quantization_config": settings(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=entry.gguf, dtype=torch.bfloat16, trust_remote_code=False, **unpack
    )
    # Unpacked weights are plain tensors, but the model still says "gguf" and refuses to be saved.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    ids = {
        k: v
        for k, v in entry.config.items()
        if k in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model.generation_config = GenerationConfig(**ids, **entry.generation)
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=entry.gguf, trust_remote_code=False)
    if entry.digits_apart:
        _split_digits(tokenizer)
    # Read from GGUF it is 10^30; a tokenizer that knows the real limit warns about it.
    tokenizer.model_max_length = entry.config["max_position_embeddings"]
    tokenizer.save_pretrained(target)
    _without_load_arguments(target / "tokenizer_config.json")


def _split_digits(tokenizer: object) -> None:
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def _without_load_arguments(path: Path) -> None:
    """transformers saves how a tokenizer was loaded beside what it is."""
    settings = json.loads(path.read_text())
    for key in ("is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


class _Heard(io.StringIO):
    """Takes what would go to the terminal, and hears from the reader's bar how far it is."""

    def __init__(self, report: Callable[[float], None]) -> None:
        super().__init__()
        self._report = report

    def write(self, text: str) -> int:
        if told := PERCENT.search(text):
            self._report(int(told[1]) / 100)
        return len(text)


@contextlib.contextmanager
def _quiet(report: Callable[[float], None]) -> Iterator[None]:
    """No warnings and no bars, also of the GGUF reader, which has no switch for it; what that one
    says of its progress is reported.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(_Heard(report)):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
