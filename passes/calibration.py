"""More calibration tokens than were given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from slimgraph import distributed
from slimgraph.errors import CalibrationError, PlanError, RecipeError
from slimgraph.passes.base import Pass, check_dtype, dtype_for, register
from slimgraph.state import State

__all__ = ["SelfCalibration"]


@register
@dataclass(frozen=True)
class SelfCalibration(Pass):
    """The dense model writes samples of its own, which join the given ones for all passes that follow.

    They are as long as the given ones and are mixed with them at random.

    Attributes:
        samples: how many it writes.
        temperature: of the sampling; 1 is the model's own distribution.
        dtype: in which it writes, if the device is faster in it: "bfloat16", or None for the model's own.
        seed: of the sampling and the mixing.
    """

    gives: ClassVar[str | None] = ""

    samples: int = 192
    temperature: float = 1.0
    dtype: str | None = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"{self.name}: samples is {self.samples}; expected at least 1")
        if not self.temperature > 0:
            raise RecipeError(f"{self.name}: temperature is {self.temperature}; expected a number above 0")
        check_dtype(self.name, self.dtype)

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Write the samples and mix them in."""
        if not state.batches:
            raise CalibrationError("self_calibration needs calibration tokens to write more; found none in the state")
        if state.generate is None:
            raise PlanError(
                "self_calibration needs a model that can write text: one of transformers with `generate`, in memory as "
                "a whole; found none in the state. Leave the pass out, or set State.generate"
            )
        given = torch.cat(list(state.batches))
        dtype = dtype_for(self.dtype, state)
        with state.watch("writing"):
            written = state.generate(
                given, self.samples, temperature=self.temperature, dtype=dtype, seed=self.seed, progress=state.progress
            )
        everything = torch.cat([given, distributed.share(written).to(given)])
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(self.seed))
        state.batches = torch.split(everything[order.to(given.device)], state.at_once or len(state.batches[0]))
