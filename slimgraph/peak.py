"""How much memory a piece of work takes at its peak, in this process or on a device."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["peak_growth"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak resident size to the current one


def peak_growth(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory grows at most while `work` runs.

    On CUDA it is what the caching allocator hands out on that device. On the CPU it is the resident memory of this
    process, read from the kernel (Linux only); what was freed before is given back first, so that it counts again.

    Args:
        work: called once.
        device: where it computes.

    Returns:
        Bytes; None where the system does not say.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    reset = _reset_peak()
    resident = _status("VmRSS")
    work()
    highest = _status("VmHWM")
    return max(0, highest - resident) if reset and highest is not None and resident is not None else None


def _give_back() -> None:
    """Have the C library return freed memory to the system, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    """Bytes of a field of this process's status."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(field + ":")), None)
    return None if found is None else int(found.split()[1]) * 1024
