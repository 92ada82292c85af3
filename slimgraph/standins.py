"""Models without weights that can be run nevertheless.

Every parameter is a view of one small pool of random numbers, at a place of its own. Tracing, surgery and the
comparison of module and graph then work as on the real model, in the memory of its largest parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimgraph.trace import canonical_names, tensor_at

__all__ = ["StandIns"]

_PERIOD = 999_983  # numbers until the pool repeats: a prime, so that no two rows of a weight are alike
_SCALE = 0.02  # standard deviation, that of freshly initialised models


class StandIns:
    """Random tensors of any shape that share their memory.

    Args:
        largest: elements of the largest tensor.
        dtype: of all of them.
        device: where the pool lies.
    """

    def __init__(self, largest: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.empty(_PERIOD).normal_(0, _SCALE, generator=generator).to(device, dtype)
        self._pool = numbers.repeat(largest // _PERIOD + 2)
        self._next = 0

    @classmethod
    def fill(cls, model: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu") -> StandIns:
        """Give every parameter of a model on the meta device a stand-in, in place; tied parameters stay tied."""
        pool = cls(max((p.numel() for p in model.parameters()), default=1), dtype, device)
        same = canonical_names(model)
        made: dict[str, nn.Parameter] = {}
        for name, _ in list(model.named_parameters(remove_duplicate=False)):
            canonical = same[name]
            if canonical not in made:
                old = tensor_at(model, canonical)
                made[canonical] = nn.Parameter(pool(old.shape), requires_grad=False)
                made[canonical].__dict__.update(old.__dict__)
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = made[canonical]
        return pool

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """A tensor of that shape."""
        self._next = (self._next + 7_919) % _PERIOD  # another place for each
        return self._pool[self._next : self._next + math.prod(shape)].view(*shape)
