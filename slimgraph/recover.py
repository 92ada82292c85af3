"""Recovery: a new output projection for the kept channels of a site, fitted from the statistics of its dense input.

Notation: X (tokens, channels) is the site's input, W (out, channels) its weight, S the kept channels. Pruning replaces
the product Y = X Wᵀ by Y' = X_S W_Sᵀ. Every function here returns the kept columns of the weight and the whole bias of
the new projection, the dense one included. Slopes and biases are computed in float64, results are in the dtype of the
dense weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimgraph.errors import NumericsError
from slimgraph.evidence import Evidence, product_with, zero_share

__all__ = ["bias_only", "none", "regression"]


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


def _finish(evidence: Evidence, channels: Tensor, slopes: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The new projection: weight diag(slopes) W_S in the dtype of W, and the dense bias plus `shift`."""
    old = evidence.weight
    kept = old.index_select(1, channels.to(old.device))
    weight = (kept.to(evidence.precision) * slopes.to(old.device, evidence.precision)[:, None]).to(old.dtype)
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
