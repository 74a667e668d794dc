"""What a model is judged by: inputs of every kind, and the logits of plain transformers."""

from pathlib import Path

import torch

from service.placement import guard
from service.placement import loading


def sample() -> dict[str, torch.Tensor]:
    """Inputs of one step on the CPU, of every kind: [2, 6] ids among them."""
    ids = torch.arange(12, dtype=torch.int64).reshape(2, 6) * 17 % 251
    return {
        "input_ids": ids,
        "position_ids": torch.arange(6, dtype=torch.int64).repeat(2, 1),
        "attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 6, 12], dtype=torch.int32),
        "inputs_embeds": torch.linspace(-1, 1, 24).reshape(2, 6, 2),
    }


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of plain transformers, float32 on the CPU, [2, tokens, vocabulary]."""
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM
    from transformers import AutoModelForSeq2SeqLM

    answers = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if answers else AutoModelForCausalLM
    more = {"decoder_input_ids": ids} if answers else {}
    with guard.LOAD_LOCK, loading.observed(lambda share: None), torch.inference_mode():
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        found: torch.Tensor = model(input_ids=ids, **more, use_cache=False).logits
        return found
