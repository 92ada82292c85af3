"""Units go one after the other, the others making up for each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimgraph.eliminate import eliminate, removal_costs
from slimgraph.errors import RecipeError
from slimgraph.evidence import Evidence
from slimgraph.passes.base import register
from slimgraph.passes.importance import _Importance

__all__ = ["Elimination"]


@register
@dataclass(frozen=True)
class Elimination(_Importance):
    """Heads and channels by backward elimination: what a least-squares fit of the others replaces best goes first.

    It goes with the recovery `least_squares`. Scores are the costs while nothing has gone yet.

    Attributes:
        prior: how strongly the fit is held at the dense weights, in tokens; infinity ranks by what is lost without a
            fit.
        steps: in how many steps units of one channel go; units of several go one at a time.
        swaps: how many of those that are gone are tried in place of others afterwards.
    """

    prior: float = 4096.0
    steps: int = 16
    swaps: int = 0

    def __post_init__(self) -> None:
        if not self.prior >= 0:
            raise RecipeError(f"{self.name}: prior is {self.prior}; expected a number of tokens, at least 0")
        if self.steps < 1:
            raise RecipeError(f"{self.name}: steps is {self.steps}; expected at least 1")
        if self.swaps < 0:
            raise RecipeError(f"{self.name}: swaps is {self.swaps}; expected at least 0")

    def scores(self, evidence: Evidence) -> Tensor:
        return removal_costs(evidence, self.prior)

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        return eliminate(evidence, keep, prior=self.prior, steps=self.steps, swaps=self.swaps)
