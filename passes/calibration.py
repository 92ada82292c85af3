"""More calibration tokens than were given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from slimgraph import distributed
from slimgraph.errors import CalibrationError, PlanError, RecipeError
from slimgraph.passes.base import Pass, check_dtype, dtype_for, register
from slimgraph.state import State

__all__ = ["SelfCalibration"]

_FEWEST = 192  # samples that are written where no number is asked for: six times the usual number of given ones


@register
@dataclass(frozen=True)
class SelfCalibration(Pass):
    """The dense model writes samples of its own, which join the given ones for all passes that follow.

    They are as long as the given ones and are mixed with them at random. More of one text than of the model's own would
    fit what is left to that text, so that of many given ones only some are used, and more are written instead.

    Attributes:
        samples: how many it writes; None for as many as are given, and at least 192.
        given: how many of the given ones are used beside them, at most; they are taken at even distances. None for all.
        temperature: of the sampling; 1 is the model's own distribution.
        dtype: in which it writes, if the device is faster in it and the model runs in it: "bfloat16", or None for the
            model's own.
        seed: of the sampling and the mixing.
    """

    gives: ClassVar[str | None] = ""

    samples: int | None = None
    given: int | None = 64
    temperature: float = 1.0
    dtype: str | None = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise RecipeError(
                f"{self.name}: samples is {self.samples}; expected at least 1, or null for the usual number"
            )
        if self.given is not None and self.given < 1:
            raise RecipeError(f"{self.name}: given is {self.given}; expected at least 1, or null for all")
        if not self.temperature > 0:
            raise RecipeError(f"{self.name}: temperature is {self.temperature}; expected a number above 0")
        check_dtype(self.name, self.dtype)

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Write the samples and mix them with the given ones that are used."""
        if not state.batches:
            raise CalibrationError("self_calibration needs calibration tokens to write more; found none in the state")
        if self.given is not None and any(self.name in entry for entry in state.history):
            raise PlanError(
                "self_calibration: another one ran before, and what that wrote would count as given; expected one such "
                "pass: ask it for more samples, or put `given: null` here"
            )
        if state.generate is None:
            raise PlanError(
                "self_calibration needs a model that can write text: one of transformers with `generate`, in memory as "
                "a whole; found none in the state. Leave the pass out, or set State.generate"
            )
        given = torch.cat(list(state.batches))
        used = self._used(given)
        samples = self.samples or max(_FEWEST, int(state.combine(torch.tensor(len(given)))))
        dtype = dtype_for(self.dtype, state)
        mine = distributed.share(torch.arange(samples))
        how = {"temperature": self.temperature, "dtype": dtype, "seed": self.seed, "progress": state.progress}
        with state.watch("writing"):
            written = state.generate(given, samples, only=mine, **how)
        everything = torch.cat([used, written.to(given)])
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(self.seed))
        state.batches = torch.split(everything[order.to(given.device)], state.at_once or len(state.batches[0]))

    def _used(self, given: Tensor) -> Tensor:
        """Those of this process's given samples (n, tokens) that are used."""
        if self.given is None:
            return given
        if self.given < distributed.world():
            raise CalibrationError(
                f"self_calibration: given is {self.given} and there are {distributed.world()} processes; expected at "
                "least one given sample for each: ask for more, for fewer processes, or for all (null)"
            )
        most = len(distributed.share(torch.arange(self.given)))
        return given if len(given) <= most else given[torch.arange(most) * len(given) // most]
