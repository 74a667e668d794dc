"""What a folder of sentence-transformers says about turning hidden states into one embedding.

Its files are few and small: `modules.json` names the steps, and each step has settings of its own.
A step that is not done here is refused by name: an embedding without it would be another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Literal

from service.errors import ModelUnavailable
from service.models import folder as model_folder

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
# the settings of the first step are called after what its class was once called
KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
LENGTHS = tuple(f"sentence_{kind}_config.json" for kind in KINDS)
# what a plan needs of a repository beside config.json
SMALL = (MODULES, PROMPTS, *LENGTHS, "*_Pooling/config.json")

Pooling = Literal["mean", "cls", "max", "last"]
POOLINGS: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
# how newer files say it
BY_NAME: Mapping[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}


@dataclass(frozen=True)
class SentenceFiles:
    """How one embedding is made of a text. The defaults are for folders that do not say.

    pooling: what becomes of the tokens' hidden states. normalize: whether the result is scaled to
    length 1. max_tokens: of one text, or None. lower: whether text is put in lower case first.
    prompt: what every text is put behind, or "".
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    max_tokens: int | None = None
    lower: bool = False
    prompt: str = ""


def is_here(folder: Path) -> bool:
    """Whether the folder is of sentence-transformers."""
    return (folder / MODULES).is_file()


def read(folder: Path) -> SentenceFiles:
    """What the files say; the defaults for a folder that has none.

    Raises ModelUnavailable, naming the file, for one that is damaged or asks for what is not done.
    """
    if not is_here(folder):
        return SentenceFiles()
    steps = _steps(folder)
    kinds = [kind for kind, _ in steps]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelUnavailable(
            f"{folder / MODULES}: its steps are {', '.join(kinds)}; done are Transformer, Pooling "
            "and, if there is one, Normalize",
            hint="serve a model without the other steps, or merge them into the model's weights",
        )
    if steps[0][1]:
        raise ModelUnavailable(
            f"{folder / MODULES}: the model is in {steps[0][1]}, not beside this file",
            hint=f"move the files of {steps[0][1]} up into {folder}, and set its path to ''",
        )
    name = next((name for name in LENGTHS if (folder / name).is_file()), None)
    settings = model_folder.read_json(folder, name) if name else {}
    pooling = model_folder.read_json(folder, f"{steps[1][1]}/config.json")
    where = folder / steps[1][1] / "config.json"
    prompt = _prompt(folder)
    if prompt and pooling.get("include_prompt") is False:
        raise ModelUnavailable(
            f"{where}: include_prompt is false, and {PROMPTS} puts a prompt before every text; "
            "leaving its tokens out is not done",
            hint=f"set default_prompt_name to null in {PROMPTS}, and send prompts in the texts",
        )
    length = settings.get("max_seq_length")
    return SentenceFiles(
        pooling=_pooling(where, pooling),
        normalize="Normalize" in kinds,
        max_tokens=length if type(length) is int and length > 0 else None,
        lower=settings.get("do_lower_case") is True,
        prompt=prompt,
    )


def _steps(folder: Path) -> list[tuple[str, str]]:
    """Kind and path of every step. The file is a list, not the object that others are."""
    path = folder / MODULES
    steps = model_folder.read_any_json(folder, MODULES)
    good = isinstance(steps, list) and all(
        isinstance(step, dict)
        and isinstance(step.get("type"), str)
        and isinstance(step.get("path"), str)
        for step in steps
    )
    if not good:
        raise ModelUnavailable(
            f"{path}: is no list of steps with type and path",
            hint="download or copy that file again",
        )
    return [(step["type"].rpartition(".")[2], step["path"].strip("/")) for step in steps]


def _pooling(path: Path, said: Mapping[str, Any]) -> Pooling:
    named = said.get("pooling_mode")
    asked = [key for key, value in said.items() if key.startswith("pooling_mode_") and value]
    if isinstance(named, str):
        asked = [named]
    known: dict[str, Pooling] = {**POOLINGS, **BY_NAME}
    if len(asked) != 1 or asked[0] not in known:
        raise ModelUnavailable(
            f"{path}: asks for {' and '.join(asked) or 'no pooling'}; done is one of mean, cls, "
            "max and last token",
            hint="serve a model that was trained with one of those",
        )
    return known[asked[0]]


def _prompt(folder: Path) -> str:
    """What is put before every text unless a caller says otherwise, which no request can."""
    if not (folder / PROMPTS).is_file():
        return ""
    said = model_folder.read_json(folder, PROMPTS)
    name, prompts = said.get("default_prompt_name"), said.get("prompts")
    if name is None:
        return ""
    prompt = prompts.get(name) if isinstance(prompts, dict) else None
    if not isinstance(prompt, str):
        raise ModelUnavailable(
            f"{folder / PROMPTS}: default_prompt_name is {name!r:.60}, which prompts lacks",
            hint="add that prompt, or set default_prompt_name to null",
        )
    return prompt
