"""How far two tensors are apart, gathered over batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Distance", "Losses", "losses"]

_AT_ONCE = 2**22  # elements that are widened to float64 at a time


@dataclass
class Distance:
    """Sums over the elements of two tensors, added up over batches.

    Attributes:
        difference, expected, found, product: Σ(y-x)², Σx², Σy², Σxy for expected values x and found ones y.
        finite: whether y had NaN or infinity nowhere where x had not.
        shapes: the two shapes, where they could not be compared.
    """

    difference: float = 0.0
    expected: float = 0.0
    found: float = 0.0
    product: float = 0.0
    finite: bool = True
    shapes: tuple[list[int], list[int]] | None = None

    def add(self, expected: Tensor, found: Tensor, kept: Mapping[int, Tensor] | None = None) -> None:
        """Gather another batch.

        Args:
            expected: of any shape and dtype.
            found: of the shape that `expected` has once only `kept` positions are left.
            kept: dimension -> (n,) int64, positions of `expected` that are compared.
        """
        for dim, positions in (kept or {}).items():
            expected = expected.index_select(dim, positions.to(expected.device))
        if expected.shape != found.shape:
            self.shapes = (list(expected.shape), list(found.shape))
            return
        for x, y in zip(_pieces(expected), _pieces(found), strict=True):
            self._add(x.double(), y.double())

    def _add(self, x: Tensor, y: Tensor) -> None:
        usable = torch.isfinite(x) & torch.isfinite(y)
        if not bool(usable.all()):
            self.finite &= bool((usable | (x == y) | x.isnan()).all())
            x, y = x[usable], y[usable]
        # The lowest float32 number bars positions in attention masks; squared it is still a float64.
        self.difference += float((y - x).square().sum())
        self.expected += float(x.square().sum())
        self.found += float(y.square().sum())
        self.product += float((x * y).sum())

    @property
    def error(self) -> float:
        """‖y-x‖ / ‖x‖; infinite where shapes differ or y is not finite."""
        if self.shapes is not None or not self.finite:
            return math.inf
        if self.expected == 0.0:
            return 0.0 if self.difference == 0.0 else math.inf
        return math.sqrt(self.difference / self.expected)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between all of x and all of y; NaN where it is not defined."""
        if self.shapes is not None or not self.finite:
            return math.nan
        norm = math.sqrt(self.expected * self.found)
        return self.product / norm if norm > 0.0 else (1.0 if self.difference == 0.0 else math.nan)


@dataclass
class Losses:
    """Sums over predicted tokens, added up over batches: KL divergence, and both cross-entropies, in nats."""

    kl: float = 0.0
    dense: float = 0.0
    pruned: float = 0.0
    tokens: int = 0

    def add(self, ids: Tensor, expected: Tensor, found: Tensor) -> None:
        """Gather another batch.

        Args:
            ids: (batch, tokens) int64.
            expected: (batch, tokens, vocabulary) logits of the dense model.
            found: those of the other one.
        """
        for row, x, y in zip(ids, expected, found, strict=True):
            kl, dense, pruned = losses(row, x, y)
            self.kl, self.dense, self.pruned = self.kl + kl, self.dense + dense, self.pruned + pruned
            self.tokens += len(row) - 1

    def mean(self) -> tuple[float, float, float]:
        """KL divergence, dense and pruned cross-entropy per predicted token."""
        n = max(1, self.tokens)
        return self.kl / n, self.dense / n, self.pruned / n


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.reshape(-1), _AT_ONCE)


def losses(ids: Tensor, expected: Tensor, found: Tensor) -> tuple[float, float, float]:
    """Summed over the predicted tokens of one window: KL(expected ‖ found) and both cross-entropies, in nats.

    Args:
        ids: (tokens,) int64.
        expected: (tokens, vocabulary) logits of the dense model.
        found: those of the other one.
    """
    x = functional.log_softmax(expected[:-1].float(), -1)
    y = functional.log_softmax(found[:-1].float(), -1)
    kl = float(functional.kl_div(y, x, reduction="sum", log_target=True))
    nll = [float(functional.nll_loss(each, ids[1:], reduction="sum")) for each in (x, y)]
    return kl, nll[0], nll[1]
