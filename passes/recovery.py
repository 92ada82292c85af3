"""How an output projection is refitted after units are gone. Each pass records the fit; the sweep carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from slimgraph import recover
from slimgraph.errors import PlanError, RecipeError
from slimgraph.evidence import TARGETS, Evidence
from slimgraph.passes.base import Pass, register
from slimgraph.state import State

__all__ = ["BiasOnly", "LeastSquares", "NoRecovery", "Regression"]


@dataclass(frozen=True)
class _Recovery(Pass):
    """A recovery pass fits a site's weight and bias to its target."""

    gives: ClassVar[str | None] = "fit"

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Record the fit."""
        if state.pending is not None:
            raise PlanError(
                f"{self.name}: {state.pending} has shared out a budget already, and counts the biases that a fit adds; "
                f"expected the fit to be known by then: put {self.name} before it"
            )
        state.fit = self.fit
        state.fit_adds_bias = self.adds_bias()
        state.twin = self.needs_twin()

    def adds_bias(self) -> bool:
        """Whether a site without bias gains one."""
        return True

    def needs_twin(self) -> str | None:
        """The target for which the dense model has to run beside the pruned one, if there is one."""
        return None

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
class LeastSquares(_Recovery):
    """All kept weights are fitted by least squares, shrunk towards the regression.

    Attributes:
        target: "local", "dense" or "stream": what the output is fitted to, see `slimgraph.evidence.TARGETS`. All but
            "local" run the dense model beside the pruned one.
        prior: how strongly, in tokens: the regression counts as much as so many more; infinity gives the regression,
            None at each site what predicts held-out samples best.
        correction: how strongly the fit to a target other than "local" is shrunk towards the one to the local target,
            in tokens; None shrinks it towards the regression at once, as `prior` says.
    """

    target: str = "local"
    prior: float | None = 4096.0
    correction: float | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise RecipeError(f"{self.name}: target is {self.target!r}; expected one of {', '.join(TARGETS)}")
        if self.prior is not None and not self.prior >= 0:
            raise RecipeError(f"{self.name}: prior is {self.prior}; expected a number of tokens, at least 0, or null")
        if self.correction is not None and not self.correction >= 0:
            raise RecipeError(f"{self.name}: correction is {self.correction}; expected a number of tokens, at least 0")
        if self.correction is not None and self.target == "local":
            raise RecipeError(
                f"{self.name}: correction is {self.correction} with the target local; expected null, or dense or stream"
            )

    def needs_twin(self) -> str | None:
        return None if self.target == "local" else self.target

    def fit(self, evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor | None]:
        return recover.least_squares(
            evidence, channels, target=self.target, prior=self.prior, correction=self.correction
        )


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
