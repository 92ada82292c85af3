"""A setting of the C library's allocator that large tensors on a CPU gain from."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

__all__ = ["give_back", "keep_freed_memory"]

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_KEPT = 128 << 20  # bytes of the largest blocks that are kept
_SPARE = 512 << 20  # bytes of freed memory that the process keeps in all, at the end of its heap


def keep_freed_memory() -> bool:
    """Let the process keep freed blocks of up to 128 MiB for its next ones, instead of giving each back to the kernel.

    By default glibc does that with every block of more than 32 MiB, and the kernel then hands out zeroed pages again,
    one fault for each 4 KiB: more work than the arithmetic on them. Larger bounds gain no more and leave holes that
    nothing fits into. For programs; a library must not decide this.

    Returns:
        Whether the C library took the setting; one other than glibc does not have it.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _KEPT)) and bool(mallopt(_TRIM_THRESHOLD, _SPARE))


def give_back() -> None:
    """Give freed memory back to the kernel now: between two stretches of work, so that holes do not pile up."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
