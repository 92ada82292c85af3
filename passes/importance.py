"""Which units matter: one pass per score. Each records how units are chosen; the sweep asks them at every site."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from slimgraph import score
from slimgraph.errors import RecipeError
from slimgraph.evidence import Evidence
from slimgraph.passes.base import Pass, register
from slimgraph.state import State

__all__ = ["FeatureSpace", "Magnitude", "Pearson", "RandomImportance", "WandaSp"]


@dataclass(frozen=True)
class _Importance(Pass):
    """An importance pass applies to heads, to channels, or to both."""

    gives: ClassVar[str | None] = "choice"

    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites whose units it chooses."""
        return ("heads", "channels")

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Record the choice."""
        for kind in self.kinds():
            state.importance[kind] = self

    def scores(self, evidence: Evidence) -> Tensor:
        """(units,) float64; what scores lowest goes first."""
        raise NotImplementedError

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        """Ascending int64 unit indices: the `keep` best of each block."""
        return score.select_top(self.scored(evidence), evidence.blocks, keep)

    def scored(self, evidence: Evidence) -> Tensor:
        """The scores, worked out once for all widths that are tried."""
        return evidence.once(self, lambda: self.scores(evidence))


@register
@dataclass(frozen=True)
class Pearson(_Importance):
    """Heads by Pearson similarity of the site's output with and without them, then greedy swaps (SlimLLM, section 3.2).

    Attributes:
        search: refine the choice by the greedy swap search (Algorithm 1).
    """

    search: bool = True

    def kinds(self) -> tuple[str, ...]:
        return ("heads",)

    def scores(self, evidence: Evidence) -> Tensor:
        return -score.pearson_similarity(evidence)

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        return score.pearson_select(evidence, keep, search=self.search)


@register
@dataclass(frozen=True)
class FeatureSpace(_Importance):
    """Channels by magnitude and direction in the output's feature space (SlimLLM, section 3.3).

    Attributes:
        directions: weight directions by the spectrum of the output's covariance.
        activations: multiply by the norm of the channel's activations.
        sources: add the projections that produce the channel.
        keep_lowest: share of the lowest-scored channels that stays nevertheless, as the published program does (0.01).
    """

    directions: bool = True
    activations: bool = True
    sources: bool = True
    keep_lowest: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.keep_lowest <= 1:
            raise RecipeError(f"{self.name}: keep_lowest is {self.keep_lowest}; expected a share between 0 and 1")

    def kinds(self) -> tuple[str, ...]:
        return ("channels",)

    def scores(self, evidence: Evidence) -> Tensor:
        return score.feature_space(
            evidence, directions=self.directions, sources=self.sources, activations=self.activations
        )

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        return score.select_top(self.scored(evidence), evidence.blocks, keep, self.keep_lowest)


@register
@dataclass(frozen=True)
class Magnitude(_Importance):
    """Heads and channels by the L2 norms of their weights, at the site and where they are produced."""

    def scores(self, evidence: Evidence) -> Tensor:
        return score.magnitude(evidence)


@register
@dataclass(frozen=True)
class WandaSp(_Importance):
    """Heads and channels by weight magnitude times activation norm, summed over the output (structured Wanda)."""

    def scores(self, evidence: Evidence) -> Tensor:
        return score.wanda(evidence)


@register
@dataclass(frozen=True)
class RandomImportance(_Importance):
    """Heads and channels at random, the same for the same seed and site.

    Attributes:
        seed: of the random numbers.
    """

    seed: int = 0

    def scores(self, evidence: Evidence) -> Tensor:
        # The site's name goes into the seed, so that layers do not all lose the same units.
        digest = hashlib.sha256(f"{self.seed} {evidence.name}".encode()).digest()
        return score.random_scores(evidence, int.from_bytes(digest[:8], "big") >> 1)
