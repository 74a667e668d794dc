"""How many bytes a model needs, module by module, before any weight is read.

Built from a skeleton on the meta device: shapes and dtypes without values. A 70B skeleton takes
0.3 s.
"""

import math
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from service.config.schema import ModelConfig
from service.errors import ModelUnavailable
from service.models import folder
from service.placement import guard
from service.placement.plan import Unit
from service.placement.tensors import nbytes

# the longest piece of a prompt that one step computes
PREFILL_CHUNK = 512
# bitsandbytes: one absmax per block of 64 weights; double quantisation stores those as one byte
# each and one float32 per 256 of them, plus the two code tables (16 and 256 float32) and an offset
# per tensor
BLOCK = 64
NESTED_BLOCK = 256
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TABLES = 16 * 4 + 256 * 4 + 4


@dataclass(frozen=True)
class Footprint:
    """Bytes of a whole model as it will be loaded.

    units are in the model's order. ties maps a unit to the one it shares a tensor with. quantized
    counts the linears that will be quantised. activations is an upper bound for one step on one
    device: a prefill chunk's hidden states and scores, and the logits. context is max_context, or
    the model's own limit if that is lower.
    """

    parameters: int
    dtype: str
    units: tuple[Unit, ...]
    ties: Mapping[str, str]
    quantized: int
    kv_bytes_per_token: int
    context: int
    sequences: int
    activations: int

    @property
    def weights(self) -> int:
        return sum(unit.weights for unit in self.units)

    @property
    def kv(self) -> int:
        return sum(unit.kv for unit in self.units)

    @property
    def kv_tokens(self) -> int:
        return self.context * self.sequences


def measure(config: ModelConfig, *, on_cpu: bool, native_bfloat16: bool) -> Footprint:
    """The footprint of the configured model; `on_cpu` and `native_bfloat16` decide the dtype.

    Reads config.json only. Raises ModelUnavailable for a config that is not a decoder-only language
    model or that transformers cannot read.
    """
    hf_config = read_config(config)
    dtype = resolve_dtype(config, hf_config, on_cpu=on_cpu, native_bfloat16=native_bfloat16)
    model = skeleton(config, hf_config, dtype)
    text = hf_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or config.max_context
    context = min(config.max_context, limit)
    converted = _converted(config, model)
    per_token, kv = _kv(text, context, config.max_sequences, dtype.itemsize)
    units = tuple(_units(model, config, converted, kv))
    if sum(unit.kv for unit in units) != sum(kv):
        raise ModelUnavailable(
            f"{config.model_id}: the {len(kv)} layers of {hf_config.model_type} were not found in "
            "its modules, so their KV cache cannot be planned",
            hint="Moorage serves decoder-only models whose layers are one list",
        )
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        units=units,
        ties=_ties(model),
        quantized=len(converted),
        kv_bytes_per_token=per_token,
        context=context,
        sequences=config.max_sequences,
        activations=_activations(text, context, dtype.itemsize),
    )


def read_config(config: ModelConfig) -> Any:
    """transformers' configuration of the model. Raises ModelUnavailable."""
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.gguf_file is not None:
        kwargs["gguf_file"] = config.gguf_file
    try:
        hf_config = transformers.AutoConfig.from_pretrained(
            config.folder, local_files_only=True, **kwargs
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(
            f"{config.model_id}: its config.json cannot be read: "
            f"{' '.join(str(error).split())[:300]}",
            hint="the model may need a newer transformers; see moorage doctor",
        ) from None
    known = type(hf_config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not known and not config.trust_remote_code:
        raise ModelUnavailable(
            f"{config.model_id}: {hf_config.model_type} is not a decoder-only language model",
            hint="Moorage serves the models that AutoModelForCausalLM knows",
        )
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
    with guard.LOAD_LOCK, torch.device("meta"):  # building one sets the process's default dtype
        model = transformers.AutoModelForCausalLM.from_config(
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


def _converted(config: ModelConfig, model: Any) -> Mapping[str, nn.Module]:
    """The linears that bitsandbytes will replace, by transformers' own rule."""
    if config.quantize == "none":
        return {}
    keep = getattr(model, "_keep_in_fp32_modules", None)
    skip = HfQuantizer.get_modules_to_not_convert(model, None, keep)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, transformers.pytorch_utils.Conv1D))
        and should_convert_module(name, skip)
    }


def quantized_bytes(elements: int, rows: int, quantize: str) -> int:
    """Bytes of one quantised weight with its scales.

    nf4 and fp4: two weights a byte, absmax per block of 64 quantised again (bitsandbytes,
    `functional.quantize_4bit`, compress_statistics). int8: one byte a weight, a float32 per row
    (`Int8Params.SCB`).
    """
    if quantize == "int8":
        return elements + 4 * rows
    blocks = math.ceil(elements / BLOCK)
    return math.ceil(elements / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + TABLES


def _units(
    model: Any, config: ModelConfig, converted: Mapping[str, nn.Module], kv: list[int]
) -> Iterator[Unit]:
    """Cut the model at its no-split modules, in order, loose tensors included."""
    whole = set(model._no_split_modules or ())
    layers = _layer_names(model, len(kv))
    seen: set[int] = set()

    def size(name: str, module: nn.Module, *, recurse: bool) -> int:
        total = 0
        for key, tensor in (
            *module.named_parameters(recurse=recurse),
            *module.named_buffers(recurse=recurse),
        ):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            path = f"{name}.{key}" if name else key
            owner, _, leaf = path.rpartition(".")
            linear = converted.get(owner) if leaf == "weight" else None
            if linear is None:
                total += nbytes(tensor)
            else:
                rows = getattr(linear, "out_features", tensor.shape[-1])
                total += quantized_bytes(tensor.numel(), rows, config.quantize)
        return total

    def cut(name: str, module: nn.Module) -> Iterator[Unit]:
        children = list(module.named_children())
        if name and (name in layers or type(module).__name__ in whole or not children):
            if any(True for _ in (*module.parameters(), *module.buffers())):
                yield Unit(
                    name,
                    size(name, module, recurse=True),
                    kv[layers[name]] if name in layers else 0,
                )
            return
        for key, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield Unit(f"{name}.{key}" if name else key, nbytes(tensor))
        for key, child in children:
            yield from cut(f"{name}.{key}" if name else key, child)

    return cut("", model)


def _layer_names(model: Any, count: int) -> Mapping[str, int]:
    """Decoder layer's name -> index: the module list that is as long as the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{i}": i for i in range(count)}
    return {}


def _ties(model: Any) -> Mapping[str, str]:
    """Unit that shares a tensor -> the unit that has it, for example lm_head ->
    model.embed_tokens.
    """
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return {a.rpartition(".")[0]: b.rpartition(".")[0] for a, b in pairs.items()}


def _kv(text: Any, context: int, sequences: int, itemsize: int) -> tuple[int, list[int]]:
    """Bytes of KV of one token over all layers, and per layer for all sequences at full context.

    Per token and layer: KV heads x (key size + value size) x itemsize. A sliding-window layer
    keeps at most its window of tokens; layers without attention keep none. Multi-head latent
    attention caches one compressed vector and one rotary key, without heads (DeepSeek-V2, 2.1).
    """
    layers = text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key, value = size, size
    if getattr(text, "kv_lora_rank", None) is not None:
        indexer = getattr(text, "index_head_dim", None) or 0
        key, value, heads = text.kv_lora_rank, text.qk_rope_head_dim + indexer, 1
    window = getattr(text, "sliding_window", None)
    plain = "sliding_attention" if window else "full_attention"
    kinds = getattr(text, "layer_types", None) or [plain] * layers
    token = heads * (key + value) * itemsize
    total, per_layer = 0, []
    for kind in kinds:
        attends = "attention" in kind and "linear" not in kind
        kept = min(context, window) if kind == "sliding_attention" and window else context
        total += token if attends else 0
        per_layer.append(token * kept * sequences if attends else 0)
    return total, per_layer


def _activations(text: Any, context: int, itemsize: int) -> int:
    """Upper bound of what one step needs beside weights and KV, in bytes.

    A prefill chunk of c tokens: residual, attention and MLP states c x (6 hidden + 3 intermediate);
    attention scores of one layer where the kernel writes them out, heads x c x context; logits of
    the last token in float32 with three copies for sampling.
    """
    chunk = min(PREFILL_CHUNK, context)
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    states: int = chunk * (6 * hidden + 3 * inner) * itemsize
    scores: int = text.num_attention_heads * chunk * context * itemsize
    logits: int = 4 * text.vocab_size * 4
    return states + scores + logits
