"""Sentences for the operator that a plan carries: what is unusual about it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from service.config.schema import ModelConfig
from service.models import sentence_files
from service.placement import kv
from service.placement.sizes import in_words

if TYPE_CHECKING:
    from service.placement.footprint import Footprint

WEIGHT_FILES = ("safetensors", "gguf", "bin")
# transfer rates for the stated slowdown of an offload, bytes a second: PCIe 4.0 x16 in practice,
# an NVMe disk
PCIE = 20e9
DISK = 2e9


def about_context(config: ModelConfig, context: int) -> tuple[str, ...]:
    if context == config.max_context:
        return ()
    return (
        f"max_context is {context:,}, the model's own limit; {config.max_context:,} was asked.",
    )


def about_files(config: ModelConfig, footprint: "Footprint") -> tuple[str, ...]:
    """Said where config.json is all there is, as for a hub id that was never downloaded, and where
    the file is smaller than what is loaded from it.
    """
    dtype = footprint.dtype
    if config.gguf_file is not None:
        size = (config.folder / config.gguf_file).stat().st_size
        return (
            f"{config.gguf_file} ({in_words(size)}) is dequantised when it is loaded: its weights "
            f"take {in_words(footprint.weights)} in {dtype}.",
        )
    if any(any(config.folder.glob(f"*.{kind}")) for kind in WEIGHT_FILES):
        return ()
    return (
        f"there are no weight files yet: sizes are config.json's, in {dtype}, and were not "
        "compared with the headers of the files.",
    )


def about_kv(footprint: "Footprint") -> tuple[str, ...]:
    """What is unusual about the KV cache."""
    said = []
    if footprint.latent:
        said.append(
            "multi-head latent attention: the KV cache holds keys and values of all heads, "
            f"{footprint.latent:.0f} times the latent vectors, because models run unmodified."
        )
    whole = footprint.context * footprint.sequences
    if footprint.kv_tokens < whole and not footprint.embeds:
        at_once = kv.running(
            footprint.kv_tokens, footprint.context, footprint.sequences, on_cuda=footprint.on_cuda
        )
        said.append(
            f"kv_tokens is {footprint.kv_tokens:,}, {footprint.kv_tokens / whole:.0%} of "
            f"max_context x max_sequences: "
            + (
                "sequences that do not fit wait, or are computed again."
                if footprint.on_cuda
                else f"{at_once} of {footprint.sequences} sequences run at once."
            )
        )
    return tuple(said)


def about_embeddings(config: ModelConfig, footprint: "Footprint") -> tuple[str, ...]:
    """Said where nothing in the folder tells how an embedding is made of hidden states."""
    if not footprint.embeds or sentence_files.is_here(config.folder):
        return ()
    return (
        f"There is no {sentence_files.MODULES} beside the model: an embedding is the mean of its "
        "tokens' hidden states, scaled to length 1.",
    )


def about_path(footprint: "Footprint") -> tuple[str, ...]:
    """Said where the fast path is out of the question; otherwise loading the model decides."""
    if not footprint.plain:
        return ()
    return (f"Runs one sequence at a time, on the plain engine path: {footprint.plain}.",)


def about_offload(away: Mapping[str, int], weights: int) -> tuple[str, ...]:
    said = []
    for device, size in away.items():
        rate, path = (PCIE, "PCIe") if device == "cpu" else (DISK, "the disk")
        said.append(
            f"{in_words(size)} ({size / weights:.0%} of weights) rest on {device}; every step "
            f"copies them over {path}, about {size / rate:.2g} s a token more."
        )
    return tuple(said)
