"""Streamed statistics of activations: what calibration keeps instead of the activations themselves.

Of a site's input or output: the token count, the mean and the centred second moments. All three are additive, so
batches, shards and ranks can be taken in any order and put together afterwards.

Everything accumulates in float64. Within one batch the rows are centred first and multiplied afterwards, so that a mean
far from zero costs no digits: the product of the centred rows is taken in float32 for float32, bfloat16 and float16
activations (which are upcast first), in float64 for float64 activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.errors import CalibrationError, NumericsError

__all__ = ["Moments", "Norms", "as_rows", "column_sums", "row_slices"]

_ROWS = 256  # tokens that are added up at a time: a few megabytes
_COLUMNS = 256  # channels whose products with all that follow are taken at a time
_VALUES = 1 << 19  # of wide rows, that are looked at at a time


@dataclass(eq=False)
class Moments:
    """Count, mean and centred second moments of rows of activations.

    Attributes:
        count: number of tokens seen.
        mean: (channels,) float64.
        scatter: (channels, channels) float64, the sum over tokens of (x - mean)(x - mean)ᵀ.

    Example:
        >>> moments = Moments.of(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
        (2, [2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """Moments of no tokens, to be updated."""
        mean = torch.zeros(channels, dtype=torch.float64, device=device)
        scatter = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        return cls(count=0, mean=mean, scatter=scatter)

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments of one tensor of activations.

        Args:
            x: (..., channels), floating point.
        """
        moments = cls.empty(x.shape[-1], device=x.device)
        moments.update(x)
        return moments

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x`, in place.

        Args:
            x: (..., channels), floating point, any leading shape; no tokens at all is allowed and changes nothing.

        Raises:
            NumericsError: `x` holds NaN or infinity, or values so large that their squares overflow. The moments are
                then as they were before.
        """
        rows = as_rows(x, len(self.mean))
        if not len(rows):
            return
        shift = (column_sums(rows) / len(rows)).to(rows.dtype)
        rows = rows - shift
        residue = column_sums(rows) / len(rows)  # what the dtype had no digits for, of a mean far from zero
        rows -= residue.to(rows.dtype)
        mean = shift + residue
        scatter = _gram(rows)
        _check_finite(mean + scatter.diagonal())
        self._absorb(len(rows), mean, scatter)

    def merge(self, other: Moments) -> Moments:
        """Moments of the tokens of both, as a new object (pairwise update of Chan, Golub and LeVeque, 1983)."""
        merged = Moments(self.count, self.mean.clone(), self.scatter.clone())
        merged._absorb(other.count, other.mean, other.scatter)
        return merged

    def combined(self, combine: Callable[[Tensor], Tensor]) -> Moments:
        """Moments over the tokens of all processes.

        Every process knows the common mean before the second moments are summed, so that nothing cancels.

        Args:
            combine: sums a tensor over the processes.
        """
        count = self.mean.new_tensor([self.count])
        sums = combine(torch.cat([count, self.mean * self.count]))
        total, mean = int(sums[0]), sums[1:] / sums[0].clamp(min=1)
        step = self.mean - mean
        return Moments(total, mean, combine(torch.addr(self.scatter, step, step, alpha=self.count)))

    def restrict(self, index: Tensor) -> Moments:
        """Moments of the chosen channels only, in the order given.

        Args:
            index: (n,) int64 channel indices.
        """
        scatter = self.scatter.index_select(0, index).index_select(1, index)
        return Moments(self.count, self.mean.index_select(0, index), scatter)

    def require_tokens(self) -> None:
        """Raise CalibrationError when no token has been seen, for callers that read `mean` or `scatter` directly."""
        _require_tokens(self.count)

    @property
    def covariance(self) -> Tensor:
        """(channels, channels) float64 population covariance: scatter / count.

        Raises:
            CalibrationError: no token has been seen.
        """
        self.require_tokens()
        return self.scatter / self.count

    @property
    def gram(self) -> Tensor:
        """(channels, channels) float64 XᵀX, not centred.

        Raises:
            CalibrationError: no token has been seen.
        """
        self.require_tokens()
        return torch.addr(self.scatter, self.mean, self.mean, alpha=self.count)

    @property
    def norms(self) -> Tensor:
        """(channels,) float64 L2 norm of each channel over the tokens, not centred.

        Raises:
            CalibrationError: no token has been seen.
        """
        self.require_tokens()
        # Rounding can leave a constant channel's scatter just below zero.
        return (self.scatter.diagonal().clamp(min=0) + self.count * self.mean.square()).sqrt()

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Add `count` tokens of known mean and scatter, in place."""
        if count == 0:
            return
        if self.count == 0:
            self.count = count
            self.mean, self.scatter = (t.to(torch.float64, copy=True) for t in (mean, scatter))
            return
        total = self.count + count
        step = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(step, step, alpha=self.count * count / total)
        self.mean += step * (count / total)
        self.count = total


@dataclass(eq=False)
class Norms:
    """Count and sum of squares per feature: all that is needed of an input whose second moments nobody asks for.

    Attributes:
        count: number of tokens seen.
        squares: (features,) float64, the sum over tokens of x².

    Example:
        >>> Norms.of(torch.tensor([[3.0, 1.0], [4.0, 0.0]])).norms.tolist()
        [5.0, 1.0]
    """

    count: int
    squares: Tensor

    @classmethod
    def empty(cls, features: int, device: torch.device | str | None = None) -> Norms:
        """Norms of no tokens, to be updated."""
        return cls(count=0, squares=torch.zeros(features, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, x: Tensor) -> Norms:
        """Norms of one tensor of activations.

        Args:
            x: (..., features), floating point.
        """
        norms = cls.empty(x.shape[-1], device=x.device)
        norms.update(x)
        return norms

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x`, in place.

        Args:
            x: (..., features), floating point, any leading shape; no tokens at all is allowed and changes nothing.

        Raises:
            NumericsError: `x` holds NaN or infinity, or values so large that their squares overflow. The norms are then
                as they were before.
        """
        rows = as_rows(x, len(self.squares))
        squares = column_sums(rows, rows)
        _check_finite(squares)
        self.squares += squares
        self.count += len(rows)

    def merge(self, other: Norms) -> Norms:
        """Norms over the tokens of both, as a new object."""
        return Norms(self.count + other.count, self.squares + other.squares)

    @property
    def norms(self) -> Tensor:
        """(features,) float64 L2 norm of each feature over the tokens.

        Raises:
            CalibrationError: no token has been seen.
        """
        _require_tokens(self.count)
        return self.squares.sqrt()


def as_rows(x: Tensor, channels: int) -> Tensor:
    """View activations as (tokens, channels) in the dtype to compute in: float64 for float64, float32 for any other.

    Raises:
        ValueError: the last dimension is another one, or the values are no floating-point numbers.
    """
    if not x.is_floating_point() or x.shape[-1:] != (channels,):
        raise ValueError(f"expected floating-point activations (..., {channels}), got {x.dtype} {tuple(x.shape)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.detach().reshape(x.shape[:-1].numel(), channels).to(dtype)


def row_slices(rows: Tensor) -> Iterator[slice]:
    """Slices that cover wide rows (rows, values), logits say, so that what is worked out of some stays in the cache."""
    step = max(1, _VALUES // rows.shape[1])
    return (slice(i, i + step) for i in range(0, len(rows), step))


def column_sums(rows: Tensor, other: Tensor | None = None) -> Tensor:
    """(channels,) float64 sums over the tokens of rows, or of their products with other rows.

    Some rows at a time are added up in their own dtype, so that they stay in the cache, and those sums in float64.

    Args:
        rows: (tokens, channels).
        other: the same shape.
    """
    sums = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for i in range(0, len(rows), _ROWS):
        part = rows[i : i + _ROWS]
        sums += (part if other is None else part * other[i : i + _ROWS]).sum(0)
    return sums


def _gram(rows: Tensor) -> Tensor:
    """(channels, channels) rowsᵀ rows, of which little more than the upper half is worked out."""
    channels = rows.shape[1]
    if channels <= _COLUMNS:
        return rows.mT @ rows
    found = rows.new_empty(channels, channels)
    for i in range(0, channels, _COLUMNS):
        products = rows[:, i : i + _COLUMNS].mT @ rows[:, i:]
        found[i : i + _COLUMNS, i:] = products
        found[i:, i : i + _COLUMNS] = products.mT
    return found


def _check_finite(per_channel: Tensor) -> None:
    """Refuse a batch by a per-channel statistic of it, which NaN and infinity in any of its rows reach."""
    finite = torch.isfinite(per_channel)
    if finite.all():
        return
    bad = (~finite).nonzero().flatten()
    raise NumericsError(
        f"activations are NaN, infinite or too large to square in {len(bad)} of {len(finite)} channels (the first is "
        f"channel {int(bad[0])}), expected finite values; run the model in bfloat16 or float32, or check its weights"
    )


def _require_tokens(count: int) -> None:
    if count == 0:
        raise CalibrationError("statistics of no tokens were asked for; calibrate with at least one token first")
