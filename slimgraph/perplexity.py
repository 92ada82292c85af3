"""Perplexity of a model on a stream of tokens, as the pruning literature measures it.

The stream is cut into windows without overlap; each window is predicted on its own, from its first token on; the mean
runs over every predicted token of every window. Where windows begin with a start-of-text token, all of their text is
predicted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgraph.errors import NumericsError
from slimgraph.memory import halved, is_out_of_memory
from slimgraph.progress import SILENT, Progress
from slimgraph.text import windows

__all__ = ["Perplexity", "perplexity"]

_LOGITS_AT_ONCE = 2**24  # in float32, 64 MB


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        value: exp of the mean negative log-likelihood over the predicted tokens.
        tokens: number of predicted tokens, `seq_len - max(1, start-of-text tokens)` per window.
        windows: number of windows.
        standard_error: of `value`, from the spread of the windows' mean losses (delta method); NaN for one window.
        seconds: wall-clock time of the evaluation.
    """

    value: float
    tokens: int
    windows: int
    standard_error: float
    seconds: float


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    seq_len: int = 128,
    start: Sequence[int] = (),
    batch: int = 8,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of `model` on `tokens`.

    The model is put in evaluation mode for the while, and runs in its own dtype; the loss is taken in float32.

    Args:
        model: called with (b, seq_len) int64 token ids, b <= batch; returns (b, seq_len, vocabulary) logits, or an
            output that has them as `.logits`.
        tokens: (n,) int64, one stream; the tail that does not fill a window is left out.
        seq_len: tokens per window, at least 2, those of `start` counted.
        start: tokens that stand before every window, see `slimgraph.text.start_tokens`; they are not predicted.
        batch: windows per call; halved as often as memory runs out.
        device: where the model's input goes; by default where its first parameter is.
        progress: shows the windows done.

    Raises:
        CalibrationError: there are fewer tokens than one window.
        NumericsError: the loss of a window is NaN or infinite.
        EvaluationError: not even one window fits into memory.
    """
    if seq_len < 2 or batch < 1:
        raise ValueError(f"perplexity needs seq_len >= 2 and batch >= 1, not seq_len={seq_len} and batch={batch}")
    rows = windows(tokens, seq_len, start=start)
    given = max(1, len(start))
    where = device if device is not None else _device_of(model)
    begun = time.perf_counter()
    losses = _window_losses(model, rows, given, batch, where, progress or SILENT)
    seconds = time.perf_counter() - begun

    value = _exp(float(losses.mean()))
    error = float(losses.std(correction=1)) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return Perplexity(
        value=value,
        tokens=len(losses) * (seq_len - given),
        windows=len(losses),
        standard_error=value * error,  # d exp(m) = exp(m) dm
        seconds=seconds,
    )


@torch.no_grad()
def _window_losses(
    model: nn.Module, rows: Tensor, given: int, batch: int, device: str | torch.device, progress: Progress
) -> Tensor:
    """Mean loss of each window's tokens after the first `given`: (n,) float64, finite."""
    was_training = model.training
    if was_training:
        model.eval()
    losses: list[float] = []
    try:
        with progress("perplexity", total=len(rows)) as tick:
            while len(losses) < len(rows):
                inputs = rows[len(losses) : len(losses) + batch]
                try:
                    found = _batch_losses(model, inputs.to(device), given, first_window=len(losses))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    found = []
                if not found:  # outside the handler: the traceback would keep what did not fit alive
                    batch = halved(len(inputs), "perplexity")
                losses += found
                tick(len(found))
    finally:
        if was_training:
            model.train()
    return torch.tensor(losses, dtype=torch.float64)


def _batch_losses(model: nn.Module, inputs: Tensor, given: int, first_window: int) -> list[float]:
    output = model(inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    losses = [_mean_loss(logits[row, given - 1 : -1], inputs[row, given:]) for row in range(len(inputs))]
    for row, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NumericsError(
                f"the loss of window {first_window + row} is {loss}, expected a finite number: check the weights for "
                "NaN and infinity, and run in float32 or bfloat16 where float16 overflows"
            )
    return losses


def _mean_loss(logits: Tensor, targets: Tensor) -> float:
    """Mean loss of one window from (t, vocabulary) logits of any dtype and (t,) targets."""
    rows_at_once = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    pieces = zip(torch.split(logits, rows_at_once), torch.split(targets, rows_at_once), strict=True)
    total = sum(float(functional.cross_entropy(row.float(), target, reduction="sum")) for row, target in pieces)
    return total / len(targets)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
