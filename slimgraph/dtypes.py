"""Weights in another dtype than the one they were computed in."""

from __future__ import annotations

import torch
from torch import Tensor

from slimgraph.errors import NumericsError

__all__ = ["cast_to", "dtype_name"]


def cast_to(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype, of the same shape.

    Args:
        name: for messages.
        tensor: of floating-point numbers.
        dtype: likewise of floating point.

    Raises:
        NumericsError: a finite number is too large for the dtype.
    """
    found = tensor.to(dtype)
    lost = torch.isfinite(tensor) & ~torch.isfinite(found)
    if bool(lost.any()):
        largest = float(tensor[lost].abs().max())
        raise NumericsError(
            f"the weight {name} holds {largest:.3g}, which is more than {dtype_name(dtype)} can hold "
            f"({torch.finfo(dtype).max:.3g}); save it in float32 or bfloat16"
        )
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype without the library's.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
