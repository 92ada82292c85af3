"""Out of memory: a smaller batch is tried by itself, and when even one sample does not fit, it is said."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from slimgraph.errors import EvaluationError

__all__ = ["halved", "is_out_of_memory", "with_smaller_batches"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def halved(batch: int, what: str) -> int:
    """Half the batch, after memory ran out with the whole.

    Args:
        batch: samples at once that did not fit.
        what: was being done, for the message.

    Raises:
        EvaluationError: there is nothing left to halve.
    """
    _release()
    if batch == 1:
        raise EvaluationError(
            f"{what}: memory ran out with a batch of 1, the smallest; ask for shorter windows, a narrower dtype like "
            "bfloat16, or a device with more memory"
        )
    _log.info("%s: memory ran out with a batch of %d; trying %d", what, batch, batch // 2)
    return batch // 2


def with_smaller_batches(run: Callable[[int], T], batch: int, what: str) -> T:
    """`run(batch)`; as often as memory runs out, again from the start with half the batch.

    >>> def needs_room(batch):
    ...     if batch > 2:
    ...         raise MemoryError
    ...     return batch
    >>> with_smaller_batches(needs_room, 8, "a test")
    2

    Raises:
        EvaluationError: a batch of 1 does not fit either.
    """
    while True:
        try:
            return run(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the traceback would keep what did not fit alive.
        batch = halved(batch, what)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
