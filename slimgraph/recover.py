"""Recovery: a new output projection for the kept channels of a site, fitted from the statistics of its dense input.

Notation: X (tokens, channels) is the site's input, W (out, channels) its weight, S the kept channels. Pruning replaces
the product Y = X Wᵀ by Y' = X_S W_Sᵀ. Every function here returns the kept columns of the weight and the whole bias of
the new projection, the dense one included. Computing is in float64, results are in the dtype of the dense weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimgraph.errors import NumericsError
from slimgraph.evidence import Evidence

__all__ = ["bias_only", "none", "regression"]

# A variance below this share of its largest possible terms is what rounding leaves of a zero.
_ZERO_VARIANCE = 1e-12


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
    evidence.moments.require_tokens()
    weight, channels = _prepare(evidence, channels)
    ones = weight.new_ones(len(weight))
    return _finish(evidence, weight, channels, ones)


def regression(evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and bias per output channel (SlimLLM, arXiv 2505.22689: linear regression of the output).

    For each output channel c, a_c and b_c minimise the sum over tokens of (Y_c - a_c Y'_c - b_c)²:
    a_c = cov(Y'_c, Y_c) / var(Y'_c) and b_c = mean(Y_c) - a_c mean(Y'_c). The weight becomes diag(a) W_S, and b joins
    the bias that the site has. With S the scatter of X, up to the token count, cov(Y'_c, Y_c) = W_S[c] S[S, :] W[c]ᵀ
    and var(Y'_c) = W_S[c] S[S, S] W_S[c]ᵀ.

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
    evidence.moments.require_tokens()
    weight, channels = _prepare(evidence, channels)
    kept = weight[:, channels]
    scatter = evidence.moments.scatter
    # The token count cancels in a_c, so the scatter serves as the covariance.
    products = kept @ scatter[channels]
    covariance = (products * weight).sum(1)
    variance = (products[:, channels] * kept).sum(1)
    scale = kept.square() @ scatter.diagonal()[channels]

    varies = ~(variance <= _ZERO_VARIANCE * scale)  # so that NaN counts as varying, and is refused in the end
    slopes = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 1.0)
    return _finish(evidence, weight, channels, slopes)


def _prepare(evidence: Evidence, channels: Tensor) -> tuple[Tensor, Tensor]:
    """The dense weight in float64 and the kept channels, both where the statistics are."""
    device = evidence.moments.scatter.device
    return evidence.weight.to(device, torch.float64), channels.to(device)


def _finish(evidence: Evidence, weight: Tensor, channels: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The new projection for given slopes a: weight diag(a) W_S, and the bias that makes the means agree."""
    kept = slopes[:, None] * weight[:, channels]
    mean = evidence.moments.mean
    # The difference first: it is exactly zero where nothing changes, and the dense bias then stays to the last bit.
    bias = weight @ mean - kept @ mean[channels]
    if evidence.bias is not None:
        bias = bias + evidence.bias.to(bias.device, torch.float64)
    new_weight = kept.to(evidence.weight.device, evidence.weight.dtype)
    new_bias = bias.to(evidence.weight.device, evidence.weight.dtype)
    _check_finite(evidence, new_weight, new_bias)
    return new_weight, new_bias


def _check_finite(evidence: Evidence, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse a projection that holds NaN or infinity."""
    for what, values in [("weight", weight), ("bias", bias)]:
        if values is not None and not torch.isfinite(values).all():
            raise NumericsError(
                f"{evidence.name}: the {what} of the recovered projection is not finite in {weight.dtype}; look for "
                f"NaN or infinity in the dense weights and the calibration activations"
            )
