"""Whether matrix products are faster in a lower precision, on the device at hand."""

from __future__ import annotations

import functools

import torch
from torch.utils.benchmark import Timer

__all__ = ["faster_in"]

_SIZE = 512  # rows and columns: large enough for full speed, a few milliseconds on a slow core
_SECONDS = 0.05  # of measuring one dtype
_GAIN = 1.2  # what is less may be chance, and is not worth the digits


@functools.cache
def faster_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products in this dtype take less time than in float32: not where a processor has no matrix unit for it.

    Measured once per process, in less than half a second.
    """
    return _GAIN * _seconds(dtype, device) < _seconds(torch.float32, device)


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    x = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
    timer = Timer(
        "linear(x, x)", globals={"linear": torch.nn.functional.linear, "x": x}, num_threads=torch.get_num_threads()
    )
    # The least, not the median: other work on the machine makes any number of the runs longer, and none shorter.
    return float(min(timer.blocked_autorange(min_run_time=_SECONDS).times))
