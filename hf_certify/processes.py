"""The processes that share a run, as ``accelerate launch`` or ``torchrun`` starts them."""

import dataclasses
import os
from typing import Any

import torch
from torch import distributed


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of how many processes this is.

    Attributes:
        rank: From 0.
        count: ``>= 1``.
    """

    rank: int
    count: int

    @classmethod
    def current(cls) -> "Processes":
        """Return where this process stands; joins the others if a launcher has started several."""
        if not distributed.is_available():
            return cls(0, 1)
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
                return cls(0, 1)
            # here: a single process has no use for it
            from accelerate import PartialState

            # without an accelerator it joins nobody unless it is told that processors are meant
            PartialState(cpu=not torch.accelerator.is_available())
        return cls(distributed.get_rank(), distributed.get_world_size())

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            distributed.barrier()

    def gather(self, found: dict[int, Any]) -> dict[int, Any]:
        """Return what all processes have found together."""
        if self.count == 1:
            return found
        parts: list[dict[int, Any] | None] = [None] * self.count
        distributed.all_gather_object(parts, found)
        return {key: value for part in parts if part is not None for key, value in part.items()}

    def from_first(self, value: Any) -> Any:  # noqa: ANN401  of any kind
        """Return the value that process 0 has."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]
