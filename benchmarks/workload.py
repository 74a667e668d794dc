"""Requests of random lengths, the same for every engine of a run and new for every run."""

import random
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent / "texts" / "placement.txt"
# Low ids are special tokens. Every model has more ids than these.
IDS = (100, 30_000)
# of English words in common vocabularies; only decides how long a prompt over HTTP is
TOKENS_A_WORD = 1.47


@dataclass(frozen=True)
class Request:
    """ids: a prompt in process. text: a prompt over HTTP. tokens: of the answer, all of them."""

    tokens: int
    ids: tuple[int, ...] = ()
    text: str = ""

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Request":
        """Back from JSON."""
        return cls(document["tokens"], tuple(document["ids"]), document["text"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Lengths:
    """Least and most tokens of prompts and answers."""

    prompt: tuple[int, int] = (64, 256)
    answer: tuple[int, int] = (64, 128)

    @property
    def most(self) -> int:
        return self.prompt[1] + self.answer[1]


def ids(count: int, lengths: Lengths, seed: int) -> list[Request]:
    """Prompts of random token ids, so that none shares a beginning with another."""
    draw = random.Random(f"ids {seed}")
    return [
        Request(answer, tuple(draw.randrange(*IDS) for _ in range(prompt)))
        for prompt, answer in _sizes(count, lengths, seed)
    ]


def texts(count: int, lengths: Lengths, seed: int) -> list[Request]:
    """Prompts of English words in random order, about as many tokens as those of `ids`."""
    draw = random.Random(f"texts {seed}")
    words = TEXT.read_text(encoding="utf-8").split()
    return [
        Request(answer, text=" ".join(draw.choices(words, k=max(1, round(prompt / TOKENS_A_WORD)))))
        for prompt, answer in _sizes(count, lengths, seed)
    ]


def _sizes(count: int, lengths: Lengths, seed: int) -> list[tuple[int, int]]:
    """Tokens of prompt and answer."""
    draw = random.Random(seed)
    return [(draw.randint(*lengths.prompt), draw.randint(*lengths.answer)) for _ in range(count)]
