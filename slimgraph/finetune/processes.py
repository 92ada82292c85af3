"""The processes of a data-parallel run, as `torchrun` and `accelerate launch` start them; one by default."""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["Processes"]


class Processes:
    """Which of the processes this is, and how they add up what they have.

    Attributes:
        size: how many there are.
        rank: number of this one, from 0.
        device: where this one computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.size, self.rank, self.device = 1, 0, device
        self._state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device.type == "cpu")
            self.size, self.rank = self._state.num_processes, self._state.process_index
            self.device = self._state.device

    @property
    def first(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, the same in each to the last bit."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        total: Tensor = reduce(tensor.to(self.device), "sum")
        return total

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()
