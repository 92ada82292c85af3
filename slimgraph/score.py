"""Importance scores: pure functions from the evidence of a site to a number per unit, and from numbers to a selection.

The higher the score the more the unit is worth. The exception is `pearson_similarity`, a similarity by definition: its
negative is the importance.

Notation: a site has input X (tokens, channels) and weight W (out, channels). Unit i contributes o_i = X_i W_iᵀ over its
own channels, and all contributions together make the dense output o. With S the scatter of X, the covariance of any two
contributions at output channel c is, up to the token count, W_i[c] S_ij W_j[c]ᵀ. So no score needs the activations.

Pearson similarity, the swap search and the feature-space importance are those of SlimLLM (arXiv 2505.22689).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slimgraph.errors import NumericsError, PlanError
from slimgraph.evidence import Evidence

__all__ = [
    "feature_space",
    "magnitude",
    "pearson_select",
    "pearson_similarity",
    "random_scores",
    "select_top",
    "wanda",
]

# A variance below this share of its largest possible terms is what rounding leaves of a zero.
_ZERO_VARIANCE = 1e-12
# A swap has to gain more than this share of the similarity: less is rounding, and would make ties a matter of luck.
_SWAP_GAIN = 1e-9


def pearson_similarity(evidence: Evidence) -> Tensor:
    """How similar the site's output stays without each unit (SlimLLM, attention heads).

    For unit i: the sum over output channels c of |ρ_c|, where ρ_c is the Pearson correlation over the tokens between
    o[:, c] and (o - o_i)[:, c]. In closed form cov(o - o_i, o) = var(o) - cov(o_i, o) and
    var(o - o_i) = var(o) - 2 cov(o_i, o) + var(o_i). A channel where either side does not vary counts 0.

    Importance is minus similarity. Channels that belong to no unit are part of o and never leave it.

    Args:
        evidence: of the site.

    Returns:
        (units,) float64, between 0 and out_features.

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the weight, the statistics or the similarities are not finite.
    """
    return _finite_scores(_Contributions.of(evidence).similarities, evidence)


def pearson_select(evidence: Evidence, keep: int, *, search: bool = True) -> Tensor:
    """Units to keep by Pearson similarity, improved by a greedy swap search (SlimLLM, Algorithm 1).

    The start is the `keep` units with the lowest similarity in every block. The search then takes the pruned units in
    turn, the most similar first, and tries to swap each with every kept unit of its own block; the best swap is made if
    it raises the sum over output channels of |ρ_c| between the kept output and the dense one. Each pruned unit is tried
    once, and a unit that is swapped out is not tried again.

    A tried swap costs one vector of length out_features per kept unit, whatever the number of tokens. Memory is
    O(channels · out_features). The covariances of a pruned unit with all others are worked out when its turn comes, so
    the whole search costs about as much as two more products of the scatter with the weight.

    Args:
        evidence: of the site.
        keep: number of units to keep in each block.
        search: whether to search after the start.

    Returns:
        (blocks * keep,) int64 unit indices, ascending.

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the weight, the statistics or the similarities are not finite.
        PlanError: `keep` is below 1 or above the size of a block.
    """
    parts = _Contributions.of(evidence)
    similarities = _finite_scores(parts.similarities, evidence)
    blocks = evidence.blocks.to(similarities.device)
    start = select_top(-similarities, blocks, keep)
    return _swap_search(parts, blocks, start) if search else start


def feature_space(
    evidence: Evidence, *, directions: bool = True, sources: bool = True, activations: bool = True
) -> Tensor:
    """Importance by magnitude and by direction in the space of the site's output (SlimLLM, feed-forward channels).

    With C = W cov(X) Wᵀ the covariance of the output, λ and V its eigenvalues and eigenvectors and
    ω = sigmoid(λ / mean λ), channel j is worth ‖ω ⊙ (Vᵀ W[:, j])‖₂ · ‖X[:, j]‖₂: what it writes into strong directions
    of the output counts up to twice as much as what it writes into weak ones. The absolute value in the paper's formula
    has no effect on the norm and is left out. Every source projection adds ‖W_src[j, :] ⊙ ‖Z‖₂‖₂ for its row j, with
    ‖Z‖₂ the norm of each of its input features over the tokens. A unit is worth the sum over its channels and rows.

    An output that does not vary has no directions: ω is then the same for all.

    Args:
        evidence: of the site.
        directions: weigh directions by ω; if not, ‖W[:, j]‖₂ stands in place of the weighted norm.
        sources: add the terms of the source projections.
        activations: multiply by the norms of the activations; if not, they count as 1.

    Returns:
        (units,) float64.

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the weight, the statistics or the scores are not finite.
    """
    weight = _finite_weight(evidence)
    if directions:
        weight = _weigh_directions(weight, evidence.moments.scatter)
    per_channel = torch.linalg.vector_norm(weight, dim=0)
    if activations:
        per_channel = per_channel * evidence.moments.norms
    scores = _sum_by_unit(per_channel, evidence.units, len(evidence.blocks))[:-1]
    if sources:
        scores = scores + _source_scores(evidence, activations=activations)
    return _finite_scores(scores, evidence)


def wanda(evidence: Evidence) -> Tensor:
    """Wanda's weight importance |W[c, j]| · ‖X[:, j]‖₂ (arXiv 2306.11695), summed over the site's whole columns.

    Only the site's own weight counts, the source projections do not. A unit is worth the sum over its channels.

    Args:
        evidence: of the site.

    Returns:
        (units,) float64.

    Raises:
        CalibrationError: no token has been seen.
        NumericsError: the weight, the statistics or the scores are not finite.
    """
    per_channel = _finite_weight(evidence).abs().sum(0) * evidence.moments.norms
    return _finite_scores(_sum_by_unit(per_channel, evidence.units, len(evidence.blocks))[:-1], evidence)


def magnitude(evidence: Evidence) -> Tensor:
    """Importance by weights alone: L2 norms of a unit's columns in the site and of its rows in the sources, summed.

    Args:
        evidence: of the site; its activation statistics are not read.

    Returns:
        (units,) float64.

    Raises:
        NumericsError: a weight or a score is not finite.
    """
    per_channel = torch.linalg.vector_norm(evidence.weight.to(_device(evidence), torch.float64), dim=0)
    scores = _sum_by_unit(per_channel, evidence.units, len(evidence.blocks))[:-1]
    return _finite_scores(scores + _source_scores(evidence, activations=False), evidence)


def random_scores(evidence: Evidence, seed: int) -> Tensor:
    """Scores that mean nothing, to compare the others with.

    Args:
        evidence: of the site; only the number of units is read.
        seed: the same seed gives the same scores on every device.

    Returns:
        (units,) float64, uniform in [0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(evidence.blocks), dtype=torch.float64, generator=generator)
    return scores.to(_device(evidence))


def select_top(scores: Tensor, blocks: Tensor, keep: int, keep_lowest: float = 0.0) -> Tensor:
    """The `keep` units of every block with the highest scores; of equal scores the lower index comes first.

    `keep_lowest` is a detail of the program that the authors of SlimLLM published, absent from their paper: it keeps
    the lowest-scored 1 % of the feed-forward channels (`keep_lowest=0.01`) and drops the next ones instead. The share
    is of all units of the block, rounded to a whole number of units; these count towards `keep`.

    Args:
        scores: (units,), higher is better.
        blocks: (units,) int64, the block of each unit, numbered 0, 1, ... without gaps.
        keep: number of units to keep in each block.
        keep_lowest: share of each block, 0 to 1.

    Returns:
        (blocks * keep,) int64 unit indices, ascending.

    Raises:
        NumericsError: a score is not finite.
        PlanError: `keep` is below 1 or above the size of a block, or `keep_lowest` is not in [0, 1].
    """
    if not torch.isfinite(scores).all():
        raise NumericsError("scores to select by are not finite; check the weights and the calibration data")
    if not 0.0 <= keep_lowest <= 1.0:
        raise PlanError(f"keep_lowest is {keep_lowest}, expected a share between 0 and 1")
    sizes = torch.bincount(blocks).tolist()
    smallest = min(sizes, default=0)
    if not 1 <= keep <= smallest:
        raise PlanError(f"cannot keep {keep} units of each block: the smallest block has {smallest}, and 1 must stay")

    best_first = scores.argsort(descending=True, stable=True)
    kept = []
    for block, size in enumerate(sizes):
        ranked = best_first[blocks[best_first] == block]
        lowest = min(round(keep_lowest * size), keep)
        kept += [ranked[: keep - lowest], ranked[size - lowest :]]
    return torch.cat(kept).sort().values


@dataclass(frozen=True)
class _Contributions:
    """Second moments of what the units of a site contribute to its output, all times the token count.

    The token count is left in because correlations do not depend on it, and dividing would copy the scatter.

    Attributes:
        weight: (out, channels) float64.
        scatter: (channels, channels) float64.
        slots: (channels,) int64, the unit of each channel; channels of no unit share one more slot, the last.
        n_units: number of units, without that slot.
        scale: (out,) float64, sum of the variances of single channels, the yardstick for what counts as zero.
    """

    weight: Tensor
    scatter: Tensor
    slots: Tensor
    n_units: int
    scale: Tensor

    @classmethod
    def of(cls, evidence: Evidence) -> _Contributions:
        evidence.moments.require_tokens()
        weight = _finite_weight(evidence)
        scatter = evidence.moments.scatter
        n_units = len(evidence.blocks)
        slots = _slots(evidence.units.to(scatter.device), n_units)
        return cls(weight, scatter, slots, n_units, weight.square() @ scatter.diagonal())

    @cached_property
    def with_dense(self) -> Tensor:
        """(units + 1, out) covariance of each contribution, the last slot's too, with the dense output."""
        return self.with_part(torch.arange(len(self.slots), device=self.slots.device))

    @cached_property
    def dense_variance(self) -> Tensor:
        """(out,) variance of the dense output."""
        return self.with_dense.sum(0)

    @cached_property
    def variances(self) -> Tensor:
        """(units, out) variance of each contribution."""
        variances = self.weight.new_empty(self.n_units, len(self.weight))
        for unit in range(self.n_units):
            channels = self.channels_of(unit)
            columns = self.weight[:, channels]
            variances[unit] = (columns @ self.scatter[channels][:, channels] * columns).sum(1)
        return variances

    @cached_property
    def similarities(self) -> Tensor:
        """(units,) similarity of the output without each unit to the dense output."""
        covariances = self.dense_variance - self.with_dense[:-1]
        return self.similarity(covariances, covariances - self.with_dense[:-1] + self.variances)

    def channels_of(self, unit: int) -> Tensor:
        return (self.slots == unit).nonzero().flatten()

    def with_part(self, channels: Tensor) -> Tensor:
        """(units + 1, out) covariance of each contribution, the last slot's too, with that of the given channels."""
        products = self.scatter[:, channels] @ self.weight[:, channels].mT
        return _sum_by_slot(self.weight.mT * products, self.slots, self.n_units + 1)

    def similarity(self, covariance: Tensor, variance: Tensor) -> Tensor:
        """Sum over output channels of |ρ_c| between some output and the dense one; 0 for channels that do not vary.

        Args:
            covariance: (..., out) of the output with the dense output.
            variance: (..., out) of the output.

        Returns:
            (...) float64.
        """
        zero = _ZERO_VARIANCE * self.scale
        varies = (variance > zero) & (self.dense_variance > zero)
        deviations = torch.where(varies, variance * self.dense_variance, 1.0).sqrt()
        correlations = (covariance.abs() / deviations).clamp(max=1.0)
        return torch.where(varies, correlations, 0.0).sum(-1)


def _swap_search(parts: _Contributions, blocks: Tensor, start: Tensor) -> Tensor:
    """Improve the kept units by swaps within blocks; see `pearson_select`."""
    stays = torch.zeros(parts.n_units + 1, dtype=torch.bool, device=start.device)
    stays[start] = True
    stays[-1] = True  # the slot of the channels that belong to no unit

    with_dense, variances = parts.with_dense, parts.variances
    with_kept = parts.with_part(stays[parts.slots].nonzero().flatten())
    covariance = with_dense[stays].sum(0)  # of the kept output with the dense one
    variance = with_kept[stays].sum(0)  # of the kept output
    best = float(parts.similarity(covariance, variance))

    most_similar_first = parts.similarities.argsort(descending=True, stable=True)
    for unit in most_similar_first[~stays[most_similar_first]].tolist():
        rivals = (stays[:-1] & (blocks == blocks[unit])).nonzero().flatten()
        with_unit = parts.with_part(parts.channels_of(unit))
        covariances = covariance + with_dense[unit] - with_dense[rivals]
        # The variance of K + unit - rival: cross terms of both with K and with each other come in twice.
        cross_terms = with_kept[unit] - with_kept[rivals] - with_unit[rivals]
        swapped_variances = variance + variances[unit] + variances[rivals] + 2 * cross_terms
        swapped = parts.similarity(covariances, swapped_variances)

        choice = int(swapped.argmax())
        if float(swapped[choice]) <= best * (1 + _SWAP_GAIN):
            continue
        rival = int(rivals[choice])
        stays[unit], stays[rival] = True, False
        with_kept += with_unit - parts.with_part(parts.channels_of(rival))
        covariance, variance, best = covariances[choice], swapped_variances[choice], float(swapped[choice])
    return stays[:-1].nonzero().flatten()


def _weigh_directions(weight: Tensor, scatter: Tensor) -> Tensor:
    """(out, channels) columns of the weight in the eigenbasis of the output's covariance, times ω.

    λ / mean λ does not depend on the token count, so the scatter serves as the covariance.
    """
    spectrum: tuple[Tensor, Tensor] = torch.linalg.eigh(weight @ (scatter @ weight.mT))
    strengths, directions = spectrum
    strengths = strengths.clamp(min=0)
    mean = strengths.mean()
    if float(mean) > 0:
        strengths = strengths / mean
    return strengths.sigmoid()[:, None] * (directions.mT @ weight)


def _source_scores(evidence: Evidence, *, activations: bool) -> Tensor:
    """(units,) sum over a unit's source rows of their L2 norms, each feature times its activations' norm if asked."""
    device = _device(evidence)
    scores = torch.zeros(len(evidence.blocks), dtype=torch.float64, device=device)
    for source in evidence.sources:
        rows = source.weight.to(device, torch.float64)
        if activations:
            rows = rows * source.input_norms.to(device, torch.float64)
        scores += _sum_by_unit(torch.linalg.vector_norm(rows, dim=1), source.units, len(scores))[:-1]
    return scores


def _sum_by_unit(values: Tensor, units: Tensor, n_units: int) -> Tensor:
    """(n_units + 1, ...) sums over the first dimension by unit; what belongs to none (-1) goes to the last."""
    return _sum_by_slot(values, _slots(units.to(values.device), n_units), n_units + 1)


def _slots(units: Tensor, n_units: int) -> Tensor:
    """Units with -1 replaced by one more unit at the end."""
    return torch.where(units < 0, n_units, units)


def _sum_by_slot(values: Tensor, slots: Tensor, n_slots: int) -> Tensor:
    sums = torch.zeros(n_slots, *values.shape[1:], dtype=values.dtype, device=values.device)
    sums.index_add_(0, slots, values)
    return sums


def _device(evidence: Evidence) -> torch.device:
    """Where the statistics are, the largest thing at hand: everything is computed there."""
    return evidence.moments.scatter.device


def _finite_weight(evidence: Evidence) -> Tensor:
    """The site's weight in float64 where the statistics are, with both checked.

    Checked here and not only in the scores: a comparison can turn NaN into an innocent zero on the way.
    """
    weight = evidence.weight.to(_device(evidence), torch.float64)
    # A sum is finite only if all its terms are, and needs no mask of the size of the scatter.
    for what, values in [("weight", weight), ("input statistics", evidence.moments.scatter)]:
        if not torch.isfinite(values.sum()):
            raise NumericsError(f"{evidence.name}: the {what} hold NaN or infinity; expected finite values")
    return weight


def _finite_scores(scores: Tensor, evidence: Evidence) -> Tensor:
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise NumericsError(
            f"{evidence.name}: the scores of {len(bad)} of {len(scores)} units are not finite (the first is unit "
            f"{int(bad[0])}); look for NaN or infinity in the weights and the calibration activations"
        )
    return scores
