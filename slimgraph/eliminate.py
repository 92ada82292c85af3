"""Backward elimination: units go one after the other, each time those whose loss the others make up for best.

Notation: X (tokens, channels) is a site's input, centred, W₀ (out, channels) its weight, S the channels that stay. The
loss of a set is that of the best fit on it, as `slimgraph.recover.least_squares` would find it with W₀ as its prior:

    L(S) = min over V of ‖X W₀ᵀ - X_S Vᵀ‖² + λ‖V - W₀_S‖²,  λ = prior / tokens · mean diag(XᵀX).

With H = XᵀX + λI, W the minimiser and (H_SS)⁻¹ the inverse on what is left, the removal of the channels P costs exactly
tr(W_P ((H_SS)⁻¹_PP)⁻¹ W_Pᵀ) - λ‖W₀_P‖², and afterwards W and the inverse follow by one step of block elimination. Block
growth undoes the step. So a swap is tried exactly: a unit that is gone comes back, and what then costs least goes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimgraph.evidence import Evidence
from slimgraph.recover import shifted_factor
from slimgraph.score import check_keep, select_top

__all__ = ["Left", "eliminate", "removal_costs", "swap"]

_SWAP_GAIN = 1e-9  # of a cost: less is rounding, and would make ties a matter of luck


class Left:
    """What is left at a site after some of its units are gone.

    Args:
        evidence: of the site.
        prior: how strongly the weight is held, in tokens; finite.

    Attributes:
        channels: (left,) int64 ascending, the channels that are left.
        weight: (out, left) float64, the best fit on them.
        inverse: (left, left) float64, that of XᵀX + λI on them.
        shift: () float64, λ.

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the weight or the activations are not finite, or there is no inverse.
    """

    def __init__(self, evidence: Evidence, prior: float) -> None:
        evidence.require_finite_weight()
        gram = evidence.moments.scatter
        factor, self.shift = shifted_factor(evidence, gram, prior / evidence.count * gram.diagonal().mean())
        self.inverse = torch.cholesky_inverse(factor)
        self.weight = evidence.weight.to(gram.device, torch.float64, copy=True)
        self.channels = torch.arange(len(gram), device=gram.device)
        self._gram = gram
        self._held = self.shift * self.weight.square().sum(0)  # of all dense columns: their share of the prior
        self._wanted = self.weight @ gram + self.shift * self.weight  # W (H_SS) for the best fit on any S
        self._units = evidence.units.to(gram.device)
        self._sizes = torch.bincount(self._units[self._units >= 0], minlength=len(evidence.blocks))

    @property
    def units(self) -> Tensor:
        """(n,) int64 ascending: units that are left."""
        own = self._units[self.channels]
        found: Tensor = torch.unique(own[own >= 0])
        return found

    @property
    def single(self) -> bool:
        """Whether every unit has one channel."""
        return bool((self._sizes == 1).all())

    def costs(self) -> Tensor:
        """(units,) float64: what the loss gains when that unit alone goes next; infinite for those that are gone."""
        own = self._units[self.channels]
        found = self.weight.new_full((len(self._sizes),), math.inf)
        if self.single:
            losses = self.weight.square().sum(0) / self.inverse.diagonal() - self._held[self.channels]
            found[own[own >= 0]] = losses[own >= 0]
            return found
        for unit in torch.unique(own[own >= 0]).tolist():
            at = (own == unit).nonzero().flatten()
            columns = self.weight[:, at].mT
            solved = torch.linalg.solve(self.inverse[at][:, at], columns)
            found[unit] = (columns * solved).sum() - self._held[self.channels[at]].sum()
        return found

    def remove(self, units: Tensor) -> None:
        """Take units away, all at once, and fit the others again.

        Args:
            units: (n,) int64, units that are left.
        """
        gone = torch.isin(self._units[self.channels], units)
        stays, rows = ~gone, self.inverse[gone]
        steps = torch.linalg.solve(rows[:, gone], rows[:, stays])
        self.weight = self.weight[:, stays] - self.weight[:, gone] @ steps
        self.inverse = self.inverse[stays][:, stays] - rows[:, stays].mT @ steps
        self.channels = self.channels[stays]

    def add(self, units: Tensor) -> None:
        """Take units back, all at once, and fit the others again.

        Args:
            units: (n,) int64, units that are gone.
        """
        back = torch.isin(self._units, units).nonzero().flatten()
        steps, inner = self._growth(back)
        weight = (self._wanted[:, back] - self.weight @ self._gram[self.channels][:, back]) @ inner
        crossed = -steps @ inner
        order = torch.cat([self.channels, back]).argsort()
        self.weight = torch.cat([self.weight - weight @ steps.mT, weight], 1)[:, order]
        top = torch.cat([self.inverse - crossed @ steps.mT, crossed], 1)
        self.inverse = torch.cat([top, torch.cat([crossed.mT, inner], 1)])[order][:, order]
        self.channels = torch.cat([self.channels, back])[order]

    def gains(self) -> Tensor:
        """(units,) float64: what the loss would lose if that unit alone came back; minus infinity for those left."""
        gone = torch.ones_like(self._units, dtype=torch.bool)
        gone[self.channels] = False
        back = (gone & (self._units >= 0)).nonzero().flatten()
        own = self._units[back]
        found = self.weight.new_full((len(self._sizes),), -math.inf)
        beside = self._gram[self.channels][:, back]
        rests = self._wanted[:, back] - self.weight @ beside
        if self.single:
            inner = self._gram.diagonal()[back] + self.shift - (beside * (self.inverse @ beside)).sum(0)
            found[own] = rests.square().sum(0) / inner - self._held[back]
            return found
        for unit in torch.unique(own).tolist():
            at = (own == unit).nonzero().flatten()
            _, block = self._growth(back[at])
            found[unit] = ((rests[:, at] @ block) * rests[:, at]).sum() - self._held[back[at]].sum()
        return found

    def _growth(self, back: Tensor) -> tuple[Tensor, Tensor]:
        """(H_SS)⁻¹ H_SP for channels P that come back, and the inverse's own block for them."""
        beside = self._gram[self.channels][:, back]
        steps = self.inverse @ beside
        own = self._gram[back][:, back] - beside.mT @ steps
        own.diagonal().add_(self.shift)
        return steps, torch.linalg.inv(own)


def removal_costs(evidence: Evidence, prior: float = 4096.0) -> Tensor:
    """What the loss gains when each unit goes alone.

    Args:
        evidence: of the site.
        prior: how strongly the weight is held, in tokens. Infinity means that nothing is fitted again: a channel then
            costs its variance times the squared norm of its column, times the tokens, and a unit the sum of that.

    Returns:
        (units,) float64.

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the weight or the activations are not finite, or no fit is found.
    """
    if _fits(evidence, prior):
        return Left(evidence, prior).costs()
    evidence.require_finite_weight()
    units = evidence.units.to(evidence.device)
    terms = evidence.variances * evidence.count
    values = terms * evidence.weight.to(terms.device, torch.float64).square().sum(0)
    return values.new_zeros(len(evidence.blocks)).index_add_(0, units[units >= 0], values[units >= 0])


def eliminate(evidence: Evidence, keep: int, *, prior: float = 4096.0, steps: int = 16, swaps: int = 0) -> Tensor:
    """Units that stay when what costs least goes, and what the next ones cost is worked out again after that.

    Units of several channels go one at a time. Units of one channel go in steps, equally many in each: all steps
    together then cost about one inverse of H, whatever their number.

    Args:
        evidence: of the site.
        keep: number of units to keep in each block.
        prior: as for `removal_costs`; where nothing is fitted again, costs do not change from step to step.
        steps: number of steps, at least 1.
        swaps: how many units that are gone are tried in place of others afterwards, see `swap`.

    Returns:
        (blocks * keep,) int64 unit indices, ascending.

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the weight or the activations are not finite, or no fit is found.
        PlanError: `keep` is below 1 or above the size of a block.
    """
    blocks = evidence.blocks.to(evidence.device)
    check_keep(blocks, keep)
    if not _fits(evidence, prior):
        return select_top(removal_costs(evidence, prior), blocks, keep)
    left = Left(evidence, prior)
    surplus = torch.bincount(blocks) - keep
    while surplus.any():
        ranked = left.costs().argsort(stable=True)
        if left.single:
            counts = (-(-surplus // steps)).tolist()
            gone = torch.cat([ranked[blocks[ranked] == b][:n] for b, n in enumerate(counts)])
            steps = max(1, steps - 1)
        else:
            gone = ranked[surplus[blocks[ranked]] > 0][:1]
        left.remove(gone)
        surplus -= torch.bincount(blocks[gone], minlength=len(surplus))
    swap(left, blocks, swaps)
    return left.units


def swap(left: Left, blocks: Tensor, most: int) -> int:
    """Put units that are gone in place of others of their blocks, where that makes the loss smaller.

    Those that would gain most come first. Each is taken back, and what then costs least of its block goes: itself, if
    it was not worth it.

    Args:
        left: what is left; changed in place.
        blocks: (units,) int64, the block of each unit.
        most: how many are tried.

    Returns:
        How many were swapped.
    """
    if most <= 0:
        return 0
    gains, swapped = left.gains(), 0
    order = gains.argsort(descending=True, stable=True)
    for unit in order[: min(most, int(torch.isfinite(gains).sum()))]:
        left.add(unit[None])
        costs = left.costs().masked_fill(blocks != blocks[unit], math.inf)
        worst = costs.argmin()
        worth = bool(costs[worst] < costs[unit] - _SWAP_GAIN * costs[unit].abs())  # what comes back may cost nothing
        left.remove((worst if worth else unit)[None])
        swapped += worth
    return swapped


def _fits(evidence: Evidence, prior: float) -> bool:
    """Whether there is something to fit: a finite prior, and channels that vary."""
    return math.isfinite(prior) and bool(evidence.moments.scatter.diagonal().any())
