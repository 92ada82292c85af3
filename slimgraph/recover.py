"""Recovery: a new output projection for the kept channels of a site, fitted from statistics of its whole input.

Notation: X (tokens, channels) is the site's input, W (out, channels) its weight, S the kept channels. Pruning replaces
the product Y = X Wᵀ by Y' = X_S W_Sᵀ. Every function here returns a weight for the kept channels and the whole bias of
the new projection, the dense one included. Slopes and biases are computed in float64, results are in the dtype of the
dense weight.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimgraph.errors import NumericsError
from slimgraph.evidence import Crossed, Evidence, product_with, zero_share
from slimgraph.moments import Moments

__all__ = ["PRIORS", "bias_only", "held_out_prior", "least_squares", "none", "regression", "shifted_factor"]

PRIORS = tuple(4.0**k for k in range(3, 10))
"""Tokens, 64 to 262 144: what `held_out_prior` chooses from."""


def none(evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Plain removal: the kept columns and the dense bias, as they are.

    Args:
        evidence: of the site.
        channels: (kept,) int64 indices of the channels that stay.

    Returns:
        Weight (out, kept), and bias (out,) or None where the site has none.

    Raises:
        NumericsError: the result is not finite.
    """
    weight = evidence.weight.index_select(1, channels.to(evidence.weight.device))
    bias = None if evidence.bias is None else evidence.bias.to(weight.dtype, copy=True)
    _check_finite(evidence, weight, bias)
    return weight, bias


def bias_only(evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Make up for the mean of what is removed: the bias gains mean(Y) - mean(Y').

    Args:
        evidence: of the site.
        channels: (kept,) int64 indices of the channels that stay.

    Returns:
        Weight (out, kept), the kept columns as they are, and bias (out,).

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the result is not finite.
    """
    # The difference first: it is exactly zero where nothing changes, and the dense bias then stays to the last bit.
    shift = evidence.projected_mean() - evidence.projected_mean(channels)
    return _finish(evidence, channels, torch.ones_like(shift), shift)


def regression(evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and bias per output channel (SlimLLM, arXiv 2505.22689: linear regression of the output).

    For each output channel c, a_c and b_c minimise the sum over tokens of (Y_c - a_c Y'_c - b_c)²:
    a_c = cov(Y'_c, Y_c) / var(Y'_c) and b_c = mean(Y_c) - a_c mean(Y'_c). The weight becomes diag(a) W_S, and b joins
    the bias that the site has. The moments of Y and Y' are those of the products as the model takes them.

    Where Y'_c does not vary any a_c fits equally well: it is 1, and the bias makes up for the mean.

    Args:
        evidence: of the site.
        channels: (kept,) int64 indices of the channels that stay.

    Returns:
        Weight (out, kept) and bias (out,).

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the result is not finite.
    """
    channels = channels.to(evidence.device)
    pair = evidence.paired(channels)
    # What the squares of Y'_c would come to if no two of its terms cancelled.
    weight = evidence.weight.to(evidence.device).index_select(1, channels)
    scale = product_with(weight, evidence.norms[channels].square(), evidence.precision, squared=True)

    varies = ~(pair.variance <= zero_share(evidence.precision) * scale)  # NaN counts as varying, to be refused below
    slopes = torch.where(varies, pair.covariance / torch.where(varies, pair.variance, 1.0), 1.0)
    return _finish(evidence, channels, slopes, pair.mean - slopes * pair.sliced_mean)


def least_squares(
    evidence: Evidence,
    channels: Tensor,
    *,
    target: str = "local",
    prior: float | None = 4096.0,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:
    """All kept weights by least squares, shrunk towards what `regression` finds.

    With T the target, C the centred cross-moments of T and X_S, G those of X_S and W₀ = diag(a) W_S of the regression,
    the weight minimises ‖T - X_S Wᵀ - b‖² + λ‖W - W₀‖²:

        W = W₀ + (C - W₀ G)(G + λI)⁻¹,  b = mean(T) - W mean(X_S),  λ = prior · mean variance of a kept channel.

    So the regression counts as much as `prior` further tokens in which the kept channels are uncorrelated; it is the
    limit for many. Solved by Cholesky in float64.

    A target that differs from the local one asks for two things at once: that the others make up for the channels that
    go, which the tokens tell well, and that earlier damage is repaired, which they tell badly. With `correction` the
    two have priors of their own: the fit to the local target comes first and takes the place of W₀ in the fit to T.

    Args:
        evidence: of the site.
        channels: (kept,) int64 indices of the channels that stay.
        target: one of `slimgraph.evidence.TARGETS`.
        prior: how strongly to shrink towards the regression, in tokens; infinity gives the regression, None what
            `held_out_prior` finds.
        correction: how strongly to shrink the fit to the target towards the one to the local target, in tokens;
            infinity gives the weight of the local one, with the bias that the target has then. None fits the target at
            once. Of no account where the target is the local one.

    Returns:
        Weight (out, kept) and bias (out,).

    Raises:
        CalibrationError: no token has been seen, or the target needs the dense model beside.
        NumericsError: the system cannot be solved, or the result is not finite.
    """
    evidence.require_finite_weight()
    target = evidence.aim(target)
    first = target if correction is None else "local"
    system = _System.of(evidence, channels, first)
    system = system.solved(held_out_prior(evidence, channels, first) if prior is None else prior)
    if correction is not None and target != first:
        system = system.aimed_at(target, channels).solved(correction)
    return _checked(evidence, system.weight, system.intercept())


def held_out_prior(evidence: Evidence, channels: Tensor, target: str = "local") -> float:
    """The prior with which a fit to every other sample predicts the samples in between best, out of `PRIORS`.

    Args:
        evidence: of the site, with at least two samples.
        channels: (kept,) int64 indices of the channels that stay.
        target: one of `slimgraph.evidence.TARGETS`.

    Returns:
        A number of tokens.

    Raises:
        CalibrationError: there are not two samples.
    """
    halves = [_System.of(evidence.every(2, first), channels, target) for first in (0, 1)]

    def error(prior: float) -> float:
        return sum(other.error(half.solved(prior).weight) for half, other in itertools.permutations(halves))

    return min(PRIORS, key=error)


@dataclass(frozen=True)
class _System:
    """The normal equations of a fit of a target T by the kept channels X_S, and a weight to start from; all float64.

    Attributes:
        evidence: of the site.
        own: moments of X_S.
        crossed: moments of T and X_S.
        weight: (out, kept) what the fit is shrunk towards: the regression's, or that of a fit before.
        products: (out, kept) weight @ G, where G are the centred moments of X_S.
    """

    evidence: Evidence
    own: Moments
    crossed: Crossed
    weight: Tensor
    products: Tensor

    @classmethod
    def of(cls, evidence: Evidence, channels: Tensor, target: str) -> _System:
        """The fit of a target, to be shrunk towards the regression."""
        channels = channels.to(evidence.device)
        own, crossed = evidence.moments.restrict(channels), evidence.crossed(target, channels)
        weight = evidence.weight.to(evidence.device, torch.float64).index_select(1, channels)
        products = weight @ own.scatter
        variance = (products * weight).sum(1)
        varies = ~(variance <= zero_share(evidence.precision) * (weight.square() @ own.scatter.diagonal()))
        slopes = torch.where(varies, (crossed.scatter * weight).sum(1) / torch.where(varies, variance, 1.0), 1.0)
        return cls(evidence, own, crossed, slopes[:, None] * weight, slopes[:, None] * products)

    def aimed_at(self, target: str, channels: Tensor) -> _System:
        """The same channels and the same weight to start from, with another target."""
        return replace(self, crossed=self.evidence.crossed(target, channels.to(self.evidence.device)))

    def solved(self, prior: float) -> _System:
        """From the weight that minimises the error when the one to start from counts as so many tokens."""
        # Where no channel varies, there is nothing to fit.
        if math.isinf(prior) or not self.own.scatter.diagonal().any():
            return self
        shift = prior / self.own.count * self.own.scatter.diagonal().mean()
        factor, shift = shifted_factor(self.evidence, self.own.scatter, shift)
        change = torch.cholesky_solve((self.crossed.scatter - self.products).mT, factor).mT
        # (weight + change) G, as change (G + shift I) = crossed - products.
        return replace(self, weight=self.weight + change, products=self.crossed.scatter - shift * change)

    def intercept(self) -> Tensor:
        """(out,) what goes with the weight."""
        return self.crossed.mean - self.weight @ self.own.mean

    def error(self, weight: Tensor) -> float:
        """Sum of squares that a weight leaves of T, each output channel about its own mean."""
        explained = (weight * (2 * self.crossed.scatter - weight @ self.own.scatter)).sum()
        return float(self.crossed.squares.sum() - explained)


def shifted_factor(evidence: Evidence, gram: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of gram + shift I; where rounding keeps that from being positive, with a little more shift.

    Args:
        evidence: what the second moments are of, for messages.
        gram: (channels, channels) float64, centred second moments.
        shift: () float64, at least 0.

    Returns:
        Lower factor (channels, channels) float64, and the shift () that it is for.

    Raises:
        NumericsError: a millionth of the mean of the diagonal is not enough.
    """
    scale = gram.diagonal().mean()
    for more in (0.0, 1e-10, 1e-8, 1e-6):
        system = gram.clone()
        system.diagonal().add_(shift + more * scale)
        factor, failed = torch.linalg.cholesky_ex(system)
        if not int(failed):
            return factor, shift + more * scale
    raise NumericsError(
        f"{evidence.name}: the second moments of the kept channels are not positive definite, even with a millionth of "
        "their mean added; calibrate with more tokens, or with a larger prior"
    )


def _finish(evidence: Evidence, channels: Tensor, slopes: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The new projection: weight diag(slopes) W_S in the dtype of W, and the dense bias plus `shift`."""
    old = evidence.weight
    kept = old.index_select(1, channels.to(old.device))
    return _checked(evidence, kept.to(evidence.precision) * slopes.to(old.device, evidence.precision)[:, None], shift)


def _checked(evidence: Evidence, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    old = evidence.weight
    weight = weight.to(old.device, old.dtype)
    bias = shift if evidence.bias is None else shift + evidence.bias.to(shift.device, torch.float64)
    bias = bias.to(old.device, old.dtype)
    _check_finite(evidence, weight, bias)
    return weight, bias


def _check_finite(evidence: Evidence, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse a projection that holds NaN or infinity."""
    for what, values in [("weight", weight), ("bias", bias)]:
        # A sum is finite only if all its terms are.
        wide = torch.float64 if values is not None and values.dtype == torch.float64 else torch.float32
        if values is not None and not torch.isfinite(values.sum(dtype=wide)):
            raise NumericsError(
                f"{evidence.name}: the {what} of the recovered projection is not finite in {weight.dtype}; look for "
                f"NaN or infinity in the dense weights and the calibration activations"
            )
