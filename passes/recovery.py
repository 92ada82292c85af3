"""How an output projection is refitted after units are gone. Each pass records the fit; the sweep carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from slimgraph import recover
from slimgraph.evidence import Evidence
from slimgraph.passes.base import Pass, register
from slimgraph.state import State

__all__ = ["BiasOnly", "NoRecovery", "Regression"]


@dataclass(frozen=True)
class _Recovery(Pass):
    """A recovery pass fits a site's weight and bias to its dense output."""

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Record the fit."""
        state.fit = self.fit
        state.fit_adds_bias = self.adds_bias()

    def adds_bias(self) -> bool:
        """Whether a site without bias gains one."""
        return True

    def fit(self, evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor | None]:
        """New weight (out, kept) and bias (out,) for the kept channels."""
        raise NotImplementedError


@register
@dataclass(frozen=True)
class Regression(_Recovery):
    """Each output channel is scaled and shifted to match the dense one by least squares (SlimLLM, section 3.4)."""

    def fit(self, evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor | None]:
        return recover.regression(evidence, channels)


@register
@dataclass(frozen=True)
class BiasOnly(_Recovery):
    """Only the mean of what was lost is put back."""

    def fit(self, evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor | None]:
        return recover.bias_only(evidence, channels)


@register
@dataclass(frozen=True)
class NoRecovery(_Recovery):
    """The sliced weights stay as they are."""

    def adds_bias(self) -> bool:
        return False

    def fit(self, evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor | None]:
        return recover.none(evidence, channels)
