"""What a model's generation_config.json demands of every answer, whatever the request says.

Sampling settings there are recommendations, which a request may replace; these are how the model
was made to be run, and an answer without them is wrong. Where `generate` would follow a rule that
is not followed here, the model is refused.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import torch

from service.engine.scheduler import Piece
from service.errors import LoadFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# settings that change which tokens may come, and have no counterpart here
NOT_FOLLOWED = ("force_words_ids", "constraints", "watermarking_config", "guidance_scale")


@dataclass(frozen=True)
class Rules:
    """decoder_start: the token that an encoder-decoder's answer begins behind, else 0. first: the
    token that every answer begins with, for example a language, or None. never: tokens that are
    not chosen. not_first: those that no answer begins with.

    `forced_eos_token_id` is not among them: it makes an answer that was cut look like one that
    ended.
    """

    decoder_start: int = 0
    first: int | None = None
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Rules":
        """Read from the model's generation config. Raises LoadFailed for what is not followed."""
        found = model.generation_config
        name = type(model).__name__
        for setting in NOT_FOLLOWED:
            if getattr(found, setting, None):
                raise LoadFailed(
                    f"generation_config.json of {name} sets {setting}, which this engine does not "
                    "follow",
                    hint=f"take {setting} out of generation_config.json to serve it without",
                )
        answers = model.config.is_encoder_decoder
        return cls(
            _decoder_start(model) if answers else 0,
            getattr(found, "forced_bos_token_id", None) if answers else None,
            tuple(sorted({*_ids(found, "suppress_tokens"), *_bad_words(found, name)})),
            _ids(found, "begin_suppress_tokens"),
        )

    @property
    def constrain(self) -> bool:
        """Whether any token is demanded or forbidden."""
        return self.first is not None or bool(self.never or self.not_first)

    def applied(self, row: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Logits [vocabulary] after the piece; what may not come has the least finite one."""
        least = torch.finfo(row.dtype).min  # infinity would look like a model that broke
        begins = piece.start + len(piece.ids) == len(piece.sequence.prompt)
        if begins and self.first is not None:
            only = torch.full_like(row, least)
            only[self.first] = row[self.first]
            return only
        forbidden = (*self.never, *(self.not_first if begins else ()))
        if not forbidden:
            return row
        return row.index_fill(0, torch.tensor(forbidden, device=row.device), least)


def _decoder_start(model: "PreTrainedModel") -> int:
    """In the order of `generate`: its config, the model's, the start of a text."""
    found = model.generation_config
    for value in (
        getattr(found, "decoder_start_token_id", None),
        getattr(model.config, "decoder_start_token_id", None),
        getattr(found, "bos_token_id", None),
    ):
        if isinstance(value, int):
            return value
    raise LoadFailed(
        f"{type(model).__name__} does not say which token its decoder begins with",
        hint="set decoder_start_token_id in generation_config.json",
    )


def _ids(found: Any, setting: str) -> tuple[int, ...]:
    return tuple(getattr(found, setting, None) or ())


def _bad_words(found: Any, name: str) -> tuple[int, ...]:
    words = getattr(found, "bad_words_ids", None) or []
    if any(len(word) != 1 for word in words):
        raise LoadFailed(
            f"generation_config.json of {name} has bad_words_ids of several tokens, which this "
            "engine does not follow",
            hint="take bad_words_ids out of generation_config.json to serve it without",
        )
    ends = found.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    return tuple(word[0] for word in words if word[0] not in ends)  # as `generate` has it
