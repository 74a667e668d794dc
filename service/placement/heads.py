"""The head of an encoder that was trained to fill gaps, which embeddings do without.

A folder such as bert-base-uncased has the weights of `BertForMaskedLM`. An embedding is made of
the hidden states below its head.
"""

from collections.abc import Collection
from collections.abc import Iterator
from typing import TYPE_CHECKING
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from service.placement import guard

if TYPE_CHECKING:
    from service.placement.loading import KeyReport


def spare(model: Any) -> frozenset[str]:
    """Names of tensors by which the files may differ from `model`, because embeddings need neither.

    Of a model loaded without a head whose config.json declares the architecture with the head of
    its kind for masked words or pretraining: what lies beside the model in that architecture, and
    what `model` has and that architecture lacks (the pooler of a BertModel). Else nothing, also for
    what is no transformers model: a strategy may return anything, and its certificate says so.
    """
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is not None:
        return frozenset()
    declared = getattr(model.config, "architectures", None) or ()
    headed = list(_headed(model.config))
    if not any(kind.__name__ in declared for kind in headed):
        return frozenset()
    names = {kind.__name__: _names(kind, model.config) for kind in headed}
    prefix = f"{model.base_model_prefix}."
    of_heads = {name for found in names.values() for name in found if not name.startswith(prefix)}
    known = set().union(*(found for kind, found in names.items() if kind in declared))
    return frozenset(of_heads | {n for n in model.state_dict() if prefix + n not in known})


def note(reports: Collection["KeyReport"], names: Collection[str]) -> tuple[str, ...]:
    """What is said of those of `names` that a load dropped or did not find. Names them all."""
    dropped = sorted({name for report in reports for name in report.unexpected if name in names})
    absent = sorted({name for report in reports for name in report.missing if name in names})
    said = []
    if dropped:
        said.append(
            "Embeddings do without the head for predictions that is in the files; it is not "
            f"loaded: {', '.join(dropped)}."
        )
    if absent:
        said.append(
            "The files have no values for a part that embeddings do not use; they are random: "
            f"{', '.join(absent)}."
        )
    return tuple(said)


def _headed(config: Any) -> Iterator[Any]:
    """The classes of this kind of model with a head for masked words, or for pretraining."""
    for mapping in (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
        modeling_auto.MODEL_FOR_PRETRAINING_MAPPING,
    ):
        if type(config) in mapping:
            yield mapping[type(config)]


def _names(kind: Any, config: Any) -> frozenset[str]:
    """The tensors of a model of this class."""
    # building one sets the process's default dtype
    with guard.LOAD_LOCK, guard.stillness.keep(), torch.device("meta"):
        return frozenset(kind._from_config(config).state_dict())
