"""What an attempt holds, and how it is given back before another one begins (F21)."""

import logging
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING

from service.config.schema import DeploymentConfig
from service.errors import ServiceError
from service.placement.chain import Step

if TYPE_CHECKING:
    import weakref

    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass
class Tried:
    """One attempt.

    words: the deployment as it runs. stage: what it is doing, see `Attempt`. before: bytes that
    were allocated per device. took: bytes more, once it was loaded. model: as soon as one has been
    loaded; weak, because nothing but the attempt itself may keep it alive.
    """

    step: Step
    words: DeploymentConfig
    stage: str = ""
    before: dict[str, int] = field(default_factory=dict)
    took: dict[str, int] = field(default_factory=dict)
    model: "weakref.ref[PreTrainedModel] | None" = None

    def release(self) -> None:
        """Let the strategy undo what it did. What it raises is logged: the failure that led here
        is worth more.
        """
        model = self.model() if self.model is not None else None
        if model is None:
            return
        try:
            self.step.strategy.release(model)
        except ServiceError as error:
            log.warning("%s", error.one_line())

    def reclaim(self) -> None:
        """Prove that nothing is left. Raises LoadFailed (F21), see `loading.reclaim`."""
        from service.placement import loading

        if self.step.fault is None:
            loading.reclaim(self.model, self.before)

    def expect_back(self) -> None:
        """From what is allocated now, `reclaim` shall find what the load took to be back. For a
        model that has served: others may have been loaded, or released, since.
        """
        from service.placement import loading

        now = loading.allocated_bytes()
        self.before = {device: size - self.took.get(device, 0) for device, size in now.items()}
