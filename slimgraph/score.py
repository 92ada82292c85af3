"""Importance scores: pure functions from the evidence of a site to a number per unit, and from numbers to a selection.

The higher the score the more the unit is worth. The exception is `pearson_similarity`, a similarity by definition: its
negative is the importance.

Notation: a site has input X (tokens, channels) and weight W (out, channels). Unit i contributes o_i = X_i W_iᵀ over its
own channels, and all contributions together make the dense output o. With S the scatter of X, the covariance of any two
contributions at output channel c is, up to the token count, W_i[c] S_ij W_j[c]ᵀ. Scores read such sums over the tokens
from the evidence, never single tokens.

Pearson similarity, the swap search and the feature-space importance are those of SlimLLM (arXiv 2505.22689).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimgraph.errors import NumericsError, PlanError
from slimgraph.evidence import Evidence, column_slices, zero_share
from slimgraph.moments import Moments, column_sums

__all__ = [
    "check_keep",
    "feature_space",
    "magnitude",
    "pearson_select",
    "pearson_similarity",
    "random_scores",
    "select_top",
    "wanda",
]

# A swap has to gain more than this share of the similarity: less is rounding, and would make ties a matter of luck.
_SWAP_GAIN = {torch.float64: 1e-9, torch.float32: 1e-6}


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
    return _finite_scores(_Similarity(evidence).without_each(), evidence)


def pearson_select(evidence: Evidence, keep: int, *, search: bool = True) -> Tensor:
    """Units to keep by Pearson similarity, improved by a greedy swap search (SlimLLM, Algorithm 1).

    The start is the `keep` units with the lowest similarity in every block. The search then takes the pruned units in
    turn, the most similar first, and tries to swap each with every kept unit of its own block; the best swap is made if
    it raises the sum over output channels of |ρ_c| between the kept output and the dense one. Each pruned unit is tried
    once, and a unit that is swapped out is not tried again.

    The covariances of all pairs of contributions are worked out once, for half the price of a product of the scatter
    with the weight; a tried swap is then arithmetic on one vector of length out_features per kept unit, whatever the
    number of tokens. Memory is O(units² · out_features).

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
    parts = _Similarity(evidence)
    similarities = _finite_scores(parts.without_each(), evidence)
    blocks = evidence.blocks.to(similarities.device)
    start = select_top(-similarities, blocks, keep)
    return _swap_search(parts, similarities, blocks, start) if search else start


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
    evidence.require_finite_weight()
    form = _importance_form(evidence.output, evidence.precision) if directions else None
    per_channel = _weighted_columns(evidence.weight.to(evidence.device), form, evidence.precision)
    if activations:
        per_channel = per_channel * evidence.norms
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
    evidence.require_finite_weight()
    per_channel = evidence.weight.to(evidence.device).abs().sum(0, dtype=torch.float64) * evidence.norms
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
    per_channel = _weighted_columns(evidence.weight.to(evidence.device), None, evidence.precision)
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
    return scores.to(evidence.device)


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
    sizes = check_keep(blocks, keep)
    best_first = scores.argsort(descending=True, stable=True)
    kept = []
    for block, size in enumerate(sizes):
        ranked = best_first[blocks[best_first] == block]
        lowest = min(round(keep_lowest * size), keep)
        kept += [ranked[: keep - lowest], ranked[size - lowest :]]
    return torch.cat(kept).sort().values


def check_keep(blocks: Tensor, keep: int) -> list[int]:
    """Sizes of the blocks, each of which can keep that many units.

    Args:
        blocks: (units,) int64, the block of each unit, numbered 0, 1, ... without gaps.
        keep: number of units to keep in each block.

    Raises:
        PlanError: `keep` is below 1 or above the size of a block.
    """
    sizes: list[int] = torch.bincount(blocks).tolist()
    smallest = min(sizes, default=0)
    if not 1 <= keep <= smallest:
        raise PlanError(f"cannot keep {keep} units of each block: the smallest block has {smallest}, and 1 must stay")
    return sizes


class _Similarity:
    """Similarity of the output of some units to the dense output, from the covariances of their contributions.

    All covariances are times the token count: correlations do not depend on it.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.covariances = evidence.contributions  # (units + 1, units + 1, out); the last slot always stays
        self.with_dense = self.covariances.sum(1)  # (units + 1, out)
        self.dense_variance = self.with_dense.sum(0)
        terms = evidence.moments.scatter.diagonal().to(self.covariances.dtype)
        # Sum of the variances of single channels, the yardstick for what counts as zero.
        self._zero = zero_share(evidence.precision) * (evidence.weight.to(terms.device, terms.dtype).square() @ terms)

    def without_each(self) -> Tensor:
        """(units,) similarity of the output without each unit."""
        covariance = self.dense_variance - self.with_dense[:-1]
        own = self.covariances.diagonal(dim1=0, dim2=1).T[:-1]
        return self.of(covariance, covariance - self.with_dense[:-1] + own)

    def of(self, covariance: Tensor, variance: Tensor) -> Tensor:
        """Sum over output channels of |ρ_c| between some output and the dense one; 0 for channels that do not vary.

        Args:
            covariance: (..., out) of the output with the dense output.
            variance: (..., out) of the output.

        Returns:
            (...) float64.
        """
        varies = (variance > self._zero) & (self.dense_variance > self._zero)
        deviations = torch.where(varies, variance * self.dense_variance, 1.0).sqrt()
        correlations = (covariance.abs() / deviations).clamp(max=1.0)
        return torch.where(varies, correlations, 0.0).sum(-1, dtype=torch.float64)


def _swap_search(parts: _Similarity, similarities: Tensor, blocks: Tensor, start: Tensor) -> Tensor:
    """Improve the kept units by swaps within blocks; see `pearson_select`. A tried swap is O(out) arithmetic."""
    together = parts.covariances
    stays = torch.zeros(len(together), dtype=torch.bool, device=start.device)
    stays[start] = True
    stays[-1] = True  # the slot of the channels that belong to no unit

    with_dense = parts.with_dense
    with_kept = together[:, stays].sum(1)
    covariance = with_dense[stays].sum(0)  # of the kept output with the dense one
    variance = with_kept[stays].sum(0)  # of the kept output
    best = float(parts.of(covariance, variance))

    most_similar_first = similarities.argsort(descending=True, stable=True)
    for unit in most_similar_first[~stays[most_similar_first]].tolist():
        rivals = (stays[:-1] & (blocks == blocks[unit])).nonzero().flatten()
        covariances = covariance + with_dense[unit] - with_dense[rivals]
        # The variance of K + unit - rival: cross terms of both with K and with each other come in twice.
        cross_terms = with_kept[unit] - with_kept[rivals] - together[unit, rivals]
        own = together[unit, unit] + together[rivals, rivals]
        swapped_variances = variance + own + 2 * cross_terms
        swapped = parts.of(covariances, swapped_variances)

        choice = int(swapped.argmax())
        if float(swapped[choice]) <= best * (1 + _SWAP_GAIN[together.dtype]):
            continue
        rival = int(rivals[choice])
        stays[unit], stays[rival] = True, False
        with_kept += together[:, unit] - together[:, rival]
        covariance, variance, best = covariances[choice], swapped_variances[choice], float(swapped[choice])
    return stays[:-1].nonzero().flatten()


def _importance_form(output: Moments, precision: torch.dtype) -> Tensor:
    """(out, out) V diag(ω² - ¼) Vᵀ, for ω and V of the output's covariance: ω² = ¼ where nothing varies.

    λ / mean λ does not depend on the token count, so the scatter serves as the covariance.
    """
    spectrum: tuple[Tensor, Tensor] = torch.linalg.eigh(output.scatter.to(precision))
    strengths, directions = spectrum
    strengths = strengths.clamp(min=0)
    mean = strengths.mean()
    if float(mean) > 0:
        strengths = strengths / mean
    return (directions * (strengths.sigmoid().square() - 0.25)) @ directions.mT


def _weighted_columns(weight: Tensor, form: Tensor | None, precision: torch.dtype) -> Tensor:
    """(channels,) float64 norms of a weight's columns: sqrt(¼ wᵀw + wᵀ F w) for a form F, else sqrt(wᵀw).

    The product with the form is taken in the weight's own dtype where that is a short one: it is the smaller term, and
    what rounding adds to its 4 096 or so summands averages out to some 1e-5 of the score, like that of the weight.
    """
    short = weight.dtype in (torch.bfloat16, torch.float16)
    form = None if form is None else form.to(weight.dtype if short else precision)
    squares = []
    for at in column_slices(weight):
        columns = weight[:, at].to(precision)
        square = column_sums(columns, columns)
        if form is not None:
            product = form @ (weight[:, at] if short else columns)
            square = 0.25 * square + column_sums(columns, product.to(precision))
        squares.append(square)
    return torch.cat(squares).clamp(min=0).sqrt()


def _source_scores(evidence: Evidence, *, activations: bool) -> Tensor:
    """(units,) sum over a unit's source rows of their L2 norms, each feature times its activations' norm if asked."""
    device = evidence.device
    scores = torch.zeros(len(evidence.blocks), dtype=torch.float64, device=device)
    for source in evidence.sources:
        weights = source.input_norms.to(device, torch.float64).square() if activations else None
        scores += _sum_by_unit(_row_norms(source.weight.to(device), weights, evidence), source.units, len(scores))[:-1]
    return scores


def _row_norms(weight: Tensor, weights: Tensor | None, evidence: Evidence) -> Tensor:
    """(rows,) float64 L2 norms of a weight's rows, each feature's square times its weight."""
    squares = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for at in column_slices(weight):
        columns = weight[:, at].to(evidence.precision).square()
        # Sums of the precision's products, in float64 from chunk to chunk.
        squares += columns.sum(1) if weights is None else columns @ weights[at].to(columns.dtype)
    return squares.sqrt()


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


def _finite_scores(scores: Tensor, evidence: Evidence) -> Tensor:
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise NumericsError(
            f"{evidence.name}: the scores of {len(bad)} of {len(scores)} units are not finite (the first is unit "
            f"{int(bad[0])}); look for NaN or infinity in the weights and the calibration activations"
        )
    return scores
