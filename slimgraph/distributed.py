"""Several processes, as `torchrun` starts them: each takes a share of the calibration set, sums are over all of them.

Without `torchrun` everything here is the identity. There is no scheduler of our own: `torch.distributed` over gloo on
CPUs, nccl on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from slimgraph.errors import CalibrationError

__all__ = ["barrier", "combine", "is_first", "joined", "rank", "share", "world"]

_PATIENCE = timedelta(hours=2)  # what one process may be ahead of another: reading weights takes its time


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, for as long as the context lasts.

    Args:
        device: where to compute; under several processes `cuda` becomes the process's own GPU.

    Yields:
        The process's device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def share(samples: Tensor) -> Tensor:
    """The part of this process of the calibration samples (samples, tokens).

    Raises:
        CalibrationError: there are more processes than samples.
    """
    if len(samples) < world():
        raise CalibrationError(
            f"{len(samples)} calibration samples for {world()} processes; expected at least one for each: ask for more "
            "samples or fewer processes"
        )
    return samples.tensor_split(world())[rank()]


def combine(sums: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same to the last bit in each."""
    if world() == 1:
        return sums
    nccl = dist.get_backend() == "nccl"
    total = sums.to("cuda") if nccl and not sums.is_cuda else sums.clone()
    dist.all_reduce(total)
    return total.to(sums.device)


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()
