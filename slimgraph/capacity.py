"""How much memory there is, and how much a model takes."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch

from slimgraph.errors import CheckpointError
from slimgraph.weightfiles import stored_tensors, weight_files

__all__ = ["memory_free", "memory_needed"]


def memory_free(device: torch.device | None = None) -> int:
    """Bytes that can be had: of a GPU, else of the machine, without swapping."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def memory_needed(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights in a dtype; 0 where there are no weight files to tell by."""
    try:
        stored = stored_tensors(weight_files(directory))
    except CheckpointError:
        return 0  # whoever loads it says what is wrong
    return sum(math.prod(each.shape) for each in stored.values()) * dtype.itemsize
