"""FLAP (An et al., arXiv 2312.11983): what fluctuates least is easiest to replace by its mean, which a bias can do.

The score of an input channel is the variance of the channel over the calibration tokens times the squared norm of the
weight's column that reads it. Standardised within each site, the scores of all sites are put into one ranking, and that
ranking says how much each site loses. The bias compensation is the recovery pass `bias_only`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.budget import Budget, Goal, solve_ranked
from slimgraph.errors import CalibrationError, NumericsError, RecipeError
from slimgraph.evidence import Evidence
from slimgraph.groups import Structure
from slimgraph.passes.allocation import _Allocation, _cut_layers
from slimgraph.passes.base import register
from slimgraph.passes.importance import _Importance
from slimgraph.state import State
from slimgraph.sweep import sweep
from slimgraph.units import Units

__all__ = ["Fluctuation", "FluctuationAllocation"]


@register
@dataclass(frozen=True)
class Fluctuation(_Importance):
    """Heads and channels by how much they fluctuate, weighted by what reads them (FLAP, equation 5)."""

    def scores(self, evidence: Evidence) -> Tensor:
        return _by_unit(_fluctuation(evidence), evidence)


@register
@dataclass(frozen=True)
class FluctuationAllocation(_Allocation):
    """Every site loses what falls below one threshold on the standardised fluctuation of all sites (FLAP, section 3.3).

    The fluctuation is measured on the dense model, in one more pass over the calibration tokens. The threshold is the
    one that removes `ratio` of all parameters; `unit_ratio` is not defined for it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            raise RecipeError(f"{self.name}: unit_ratio is {self.unit_ratio}; expected ratio, of all parameters")

    def weights(self, structure: Structure, state: State) -> Mapping[int, float]:
        return dict.fromkeys(_cut_layers(structure, state), 1.0)

    def budget(self, goal: Goal, structure: Structure, state: State) -> Budget:
        return solve_ranked(goal, standardised(structure, state), self.ratio or 0.0)


def standardised(structure: Structure, state: State) -> Mapping[str, Tensor]:
    """Site name -> (units,) float64: fluctuation on the dense model, of mean 0 and deviation 1 over a site's channels.

    Raises:
        CalibrationError: there are no calibration tokens.
        NumericsError: the weights or activations of a site are not finite.
    """
    if not state.batches:
        raise CalibrationError("fluctuation_allocation needs calibration tokens; found none in the state")
    found: dict[str, Tensor] = {}

    def look(units: Units, evidence: Evidence) -> None:
        values = _fluctuation(evidence)
        deviation = values.std()
        found[units.site.name] = _by_unit((values - values.mean()) / deviation.clamp(min=1e-300), evidence).cpu()

    with state.watch("fluctuation"):
        sweep(
            structure,
            state.batches,
            state.units,
            look,
            weights=state.weights,
            combine=state.combine,
            progress=state.progress,
        )
    return found


def _fluctuation(evidence: Evidence) -> Tensor:
    """(channels,) float64."""
    variances = evidence.variances
    values = variances * evidence.weight.to(variances.device, torch.float64).square().sum(0)
    if not torch.isfinite(values).all():
        raise NumericsError(f"{evidence.name}: the fluctuation is not finite; check the weights and activations")
    return values


def _by_unit(values: Tensor, evidence: Evidence) -> Tensor:
    """(units,) mean over the channels of each unit."""
    members = evidence.units.to(values.device)
    mine = members >= 0
    sums = values.new_zeros(len(evidence.blocks)).index_add_(0, members[mine], values[mine])
    return sums / torch.bincount(members[mine], minlength=len(sums)).clamp(min=1)
