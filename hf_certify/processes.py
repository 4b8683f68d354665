"""The processes that share a run, as ``accelerate launch`` or ``torchrun`` starts them."""

import dataclasses
import os
from typing import Any

import torch


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
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not started and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls(0, 1)
        # here: a single process has no use for it
        from accelerate import PartialState

        state = PartialState()
        return cls(state.process_index, state.num_processes)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, found: dict[int, Any]) -> dict[int, Any]:
        """Return what all processes have found together."""
        if self.count == 1:
            return found
        from accelerate.utils import gather_object

        return dict(item for part in gather_object([found]) for item in part.items())

    def from_first(self, value: Any) -> Any:  # noqa: ANN401  of any kind
        """Return the value that process 0 has."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]
