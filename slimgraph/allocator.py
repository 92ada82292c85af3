"""A setting of the C library's allocator that large tensors on a CPU gain from."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_MOST = 2**31 - 1  # bytes


def keep_freed_memory() -> bool:
    """Let the process keep freed blocks of up to 2 GiB for its next ones, instead of giving each back to the kernel.

    By default glibc does that with every block of more than 32 MiB, and the kernel then hands out zeroed pages again,
    one fault for each 4 KiB: more work than the arithmetic on them. For programs; a library must not decide this.

    Returns:
        Whether the C library took the setting; one other than glibc does not have it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, _MOST) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
