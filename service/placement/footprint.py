"""How many bytes a model needs, module by module, before any weight is read.

Built from a skeleton on the meta device: shapes and dtypes without values. A 70B skeleton takes
0.3 s.
"""

import math
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from service.config.schema import ModelConfig
from service.errors import ModelUnavailable
from service.models import folder
from service.models import sentence_files
from service.placement import activations
from service.placement import architectures
from service.placement import cutting
from service.placement import guard
from service.placement import kv
from service.placement import raw_weights
from service.placement import states
from service.placement.kv_layers import LayerKv
from service.placement.kv_layers import latent_numbers
from service.placement.kv_layers import layers_kv
from service.placement.kv_layers import numbers_per_token
from service.placement.plan import Unit

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Footprint:
    """Bytes of a whole model as it will be loaded.

    units are in the model's order. ties maps a unit to the one it shares a tensor with. quantized
    counts the linears that will be quantised. activations and logits are upper bounds for one step
    on one device. context is max_context, or the model's own limit if that is lower; kv_tokens are
    kept for all `sequences` together. on_cuda: whether layers execute on CUDA, which decides how
    KV is kept. latent is how many times larger the expanded KV of multi-head latent attention is
    than its latent vectors, 0 without it. keep: linears that must not be quantised, beside those
    that transformers keeps itself. plain: why the engine runs one sequence at a time, if that is
    certain. embeds: the model gives embeddings, keeps no KV, and has no logits.
    """

    parameters: int
    dtype: str
    units: tuple[Unit, ...]
    ties: Mapping[str, str]
    quantized: int
    kv_bytes_per_token: int
    context: int
    sequences: int
    kv_tokens: int
    layers: tuple[LayerKv, ...]
    itemsize: int
    activations: int
    logits: int
    on_cuda: bool
    latent: float = 0.0
    keep: tuple[str, ...] = ()
    plain: str = ""
    embeds: bool = False

    @property
    def weights(self) -> int:
        return sum(unit.weights for unit in self.units)

    @property
    def kv(self) -> int:
        return sum(unit.kv for unit in self.units)

    def kv_of(self, context: int, sequences: int) -> int:
        """Bytes of KV that so many sequences of so many tokens would take, in whole."""
        tokens = context * sequences
        return sum(
            _kv(self.layers, tokens, context, sequences, self.itemsize, on_cuda=self.on_cuda)
        )


def measure(
    config: ModelConfig,
    *,
    on_cpu: bool,
    native_bfloat16: bool,
    threads: int = 1,
    apart: Collection[str] = (),
) -> Footprint:
    """The footprint of the configured model; `on_cpu` and `native_bfloat16` decide the dtype.

    on_cpu: layers execute on the CPU, by that many threads; else on CUDA, offloaded ones too.
    apart: modules that are to be units of their own, see `cutting.units`.

    Reads config.json, and of an embedding model what sentence-transformers wrote beside it. Raises
    ModelUnavailable for a config that is of no language model or that transformers cannot read.
    """
    hf_config = read_config(config)
    if architectures.embeds(hf_config, config):
        return _embedding(
            config,
            hf_config,
            on_cpu=on_cpu,
            native_bfloat16=native_bfloat16,
            threads=threads,
            apart=apart,
        )
    dtype = resolve_dtype(config, hf_config, on_cpu=on_cpu, native_bfloat16=native_bfloat16)
    model = skeleton(config, hf_config, dtype)
    text = hf_config.get_text_config()
    context = min(config.max_context, architectures.context_limit(hf_config) or config.max_context)
    keep = _unquantisable(config, hf_config, model)
    converted = _converted(config, model, keep)
    layers = _layers(model, text.num_hidden_layers)
    if not layers:
        raise ModelUnavailable(
            f"{config.model_id}: the {text.num_hidden_layers} layers of {hf_config.model_type} "
            "were not found in its modules, so their KV cache cannot be planned",
            hint="Moorage serves models whose decoder layers are one list",
        )
    if hf_config.is_encoder_decoder:
        kept = (LayerKv(2 * numbers_per_token(text)),) * len(layers)  # its own tokens, the prompt's
    else:
        kept = _with_states(config, hf_config, layers_kv(text, list(layers.values())), dtype)
    plain = architectures.plain_path(hf_config)
    tokens = kv_budget(config, context)
    per_layer = _kv(kept, tokens, context, config.max_sequences, dtype.itemsize, on_cuda=not on_cpu)
    layer_kv = dict(zip(layers, per_layer, strict=True))
    units = tuple(cutting.units(model, config.quantize, converted, layer_kv, apart))
    latent = latent_numbers(text)
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        units=units,
        ties=_ties(model),
        quantized=len(converted),
        kv_bytes_per_token=sum(layer.numbers for layer in kept) * dtype.itemsize,
        context=context,
        sequences=config.max_sequences,
        kv_tokens=tokens,
        layers=kept,
        itemsize=dtype.itemsize,
        activations=activations.step_bytes(
            text,
            context,
            config.max_sequences,
            dtype.itemsize,
            on_cuda=not on_cpu,
            threads=threads,
            whole_prompts=bool(plain),
        ),
        logits=activations.logits_bytes(
            text, config.max_sequences, dtype.itemsize, on_cuda=not on_cpu
        ),
        on_cuda=not on_cpu,
        latent=numbers_per_token(text) / latent if latent else 0.0,
        keep=keep,
        plain=plain,
    )


def _embedding(
    config: ModelConfig,
    hf_config: Any,
    *,
    on_cpu: bool,
    native_bfloat16: bool,
    threads: int,
    apart: Collection[str],
) -> Footprint:
    """Of a model that gives embeddings: nothing is kept of a text once it is through."""
    dtype = resolve_dtype(config, hf_config, on_cpu=on_cpu, native_bfloat16=native_bfloat16)
    model = skeleton(config, hf_config, dtype)
    text = hf_config.get_text_config()
    limits = (
        config.max_context,
        architectures.context_limit(hf_config),
        architectures.positions_of(model),
        sentence_files.read(config.folder).max_tokens,
    )
    context = min(limit for limit in limits if limit is not None)
    keep = _unquantisable(config, hf_config, model)
    converted = _converted(config, model, keep)
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        units=tuple(cutting.units(model, config.quantize, converted, {}, apart)),
        ties=_ties(model),
        quantized=len(converted),
        kv_bytes_per_token=0,
        context=context,
        sequences=config.max_sequences,
        kv_tokens=0,
        layers=(),
        itemsize=dtype.itemsize,
        activations=activations.embedding_bytes(
            text,
            context,
            config.max_sequences,
            dtype.itemsize,
            on_cuda=not on_cpu,
            threads=threads,
            fused=bool(model._supports_sdpa),
        ),
        logits=0,
        on_cuda=not on_cpu,
        keep=keep,
        embeds=True,
    )


def _with_states(
    config: ModelConfig, hf_config: Any, layers: tuple[LayerKv, ...], dtype: torch.dtype
) -> tuple[LayerKv, ...]:
    """The layers with the state of those that have no attention. Raises ModelUnavailable."""
    if all(layer.numbers for layer in layers):
        return layers
    model = skeleton(config, hf_config, torch.bfloat16).eval()
    sizes = states.bytes_per_sequence(model, dtype.itemsize, config.model_id)
    return tuple(replace(k, state=size) for k, size in zip(layers, sizes, strict=True))


def kv_budget(config: ModelConfig, context: int) -> int:
    """Tokens of KV for all sequences together, no more than they can ever use.

    context is what one sequence has at most. On the CPU only whole contexts of it are used.
    """
    most = context * config.max_sequences
    return most if config.kv_tokens is None else max(context, min(config.kv_tokens, most))


def read_config(config: ModelConfig) -> Any:
    """transformers' configuration of a model that we serve. Raises ModelUnavailable."""
    hf_config = architectures.hf_config(config)
    architectures.class_of(hf_config, config)
    quantized = getattr(hf_config, "quantization_config", None)
    if quantized is not None and config.gguf_file is None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelUnavailable(
            f"{config.model_id}: its weights are already quantised ({method}); "
            "that cannot be planned yet",
            hint="use the unquantised checkpoint with quantize: nf4, fp4 or int8",
        )
    return hf_config


def resolve_dtype(
    config: ModelConfig, hf_config: Any, *, on_cpu: bool, native_bfloat16: bool
) -> torch.dtype:
    """The configured dtype, or for `auto` the checkpoint's, if the device computes with it.

    A CPU without bfloat16 instructions, and any CPU given float16, is faster in float32.
    """
    if config.dtype != "auto":
        return _dtype(config.dtype)
    stored = getattr(hf_config.get_text_config(), "dtype", None) or _dtype_of_files(config)
    dtype = _dtype(stored) if isinstance(stored, str) else stored
    if on_cpu and dtype in (torch.float16, torch.bfloat16):
        return torch.bfloat16 if native_bfloat16 else torch.float32
    return dtype


def _dtype_of_files(config: ModelConfig) -> torch.dtype:
    """The number format of most values in the safetensors headers; float32 if there are none."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in folder.headers(config.folder).values():
        dtype = SAFETENSORS_DTYPES.get(tensor.dtype)
        if dtype is not None:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def skeleton(config: ModelConfig, hf_config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device, every tensor in its dtype and none with values."""
    # building one sets the process's default dtype
    with guard.LOAD_LOCK, guard.stillness.keep(), torch.device("meta"):
        model = architectures.class_of(hf_config, config).from_config(
            hf_config, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    kept = model._get_dtype_plan(dtype)  # tensors that transformers loads in float32 all the same
    if kept:
        pattern, plan, _ = build_glob_alternation(list(kept))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                tensor.data = tensor.data.to(dtype=kept[plan[match.lastgroup]])
    return model


def _unquantisable(config: ModelConfig, hf_config: Any, model: Any) -> tuple[str, ...]:
    """What bitsandbytes is told to leave alone, by name; empty where its own choice is right."""
    found = _converted(config, model, ())
    if not found:
        return ()
    with torch.device("meta"):
        raw = raw_weights.read_past(model, found)
    keys = sorted({name.rpartition(".")[2] for name in raw})
    return (*get_keys_to_not_convert(model), *keys) if keys else ()


def _converted(config: ModelConfig, model: Any, keep: tuple[str, ...]) -> Mapping[str, nn.Module]:
    """The linears that bitsandbytes will replace, by transformers' own rule.

    keep: what it is told to leave alone; empty: what it leaves alone by itself.
    """
    if config.quantize == "none":
        return {}
    full = getattr(model, "_keep_in_fp32_modules", None)
    skip = HfQuantizer.get_modules_to_not_convert(model, list(keep) or None, full)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, transformers.pytorch_utils.Conv1D))
        and should_convert_module(name, skip)
    }


def _layers(model: Any, count: int) -> Mapping[str, nn.Module]:
    """Decoder layer's name -> module: the module list that is as long as the model."""
    # of an encoder-decoder the decoder's, however many those are
    inside = model.get_decoder() if model.config.is_encoder_decoder else model
    lists = {id(module) for module in inside.modules() if isinstance(module, nn.ModuleList)}
    for name, module in model.named_modules():
        if id(module) in lists and (inside is not model or len(module) == count):
            return {f"{name}.{i}": layer for i, layer in enumerate(module)}
    return {}


def _ties(model: Any) -> Mapping[str, str]:
    """Unit that shares a tensor -> the unit that has it, for example lm_head ->
    model.embed_tokens.
    """
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return {a.rpartition(".")[0]: b.rpartition(".")[0] for a, b in pairs.items()}


def _kv(
    layers: tuple[LayerKv, ...],
    kv_tokens: int,
    context: int,
    sequences: int,
    itemsize: int,
    *,
    on_cuda: bool,
) -> list[int]:
    """Bytes of KV per layer for all sequences: what the engine allocates."""
    return [
        layer.numbers
        * itemsize
        * kv.pool_tokens(kv_tokens, context, sequences, layer.window, on_cuda=on_cuda)
        + layer.state * sequences
        for layer in layers
    ]
