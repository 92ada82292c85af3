"""Calibration tokens that a model makes up itself, where the text at hand is of one kind only.

What a language model writes when it is given nothing to go on from is a sample of all it was trained on. A fit to it
serves texts that look nothing like the text at hand, and no further text has to be found.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimgraph.errors import CalibrationError, NumericsError
from slimgraph.memory import is_out_of_memory, with_smaller_batches
from slimgraph.moments import row_slices
from slimgraph.progress import SILENT, Progress
from slimgraph.trace import evaluating

__all__ = ["can_generate", "generate"]

_TOGETHER = 256  # samples that are written at once, if memory allows
_BLOCK = 256  # tokens whose probabilities are added up first


def can_generate(model: nn.Module) -> bool:
    """Whether `generate` can ask this model for text: whether it has `transformers`' `generate`."""
    return callable(getattr(model, "generate", None)) and hasattr(model, "generation_config")


def generate(
    model: nn.Module,
    like: Tensor,
    samples: int,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    only: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Samples of the model's own distribution, as long as given ones, token by token with `transformers`' cache.

    Where all given samples begin with the same token, so do these. Otherwise they begin after the model's start token,
    or, where it names none that it has, with a token that is drawn from the given ones. No sample ends early.

    Args:
        model: a model that `can_generate`; not changed.
        like: (n, tokens) int64, given samples.
        samples: how many to write.
        temperature: above 0; 1 is the model's own distribution.
        dtype: in which it runs, as a copy whose parameters are in it, if it can; its own by default.
        seed: of the sampling; the global random state is neither used nor changed.
        only: (n,) int64, which of the samples to write, numbered from 0; all by default. What else is written makes no
            difference to a sample, but for rounding.
        progress: shows how far it got.

    Returns:
        (samples, tokens) int64, or as many as there are in `only`, on the device of `like`.

    Raises:
        CalibrationError: the model cannot generate, or fails when it tries.
        EvaluationError: memory runs out with a single sample at once.
        NumericsError: its probabilities are not finite.
    """
    if not can_generate(model):
        raise CalibrationError(
            f"{type(model).__name__} has no `generate` of transformers; expected a model that can write text: "
            "take a recipe without self_calibration, or the method slimllm"
        )
    device = next(model.parameters()).device
    length = like.shape[1]
    dice = torch.Generator(device).manual_seed(seed)
    with evaluating(model):
        first, ahead = _beginnings(model, like, samples, dice)
        # Drawn for all at once, so that it makes no difference which are written, and how many together.
        shares = torch.rand(length + ahead - 1, samples, generator=dice, device=device, dtype=torch.float64)
        if only is not None:
            first, shares = first[only.to(first.device)], shares[:, only.to(device)]
        writer = model if dtype is None else _copied(model, dtype, first[:1])

        def write(together: int) -> Tensor:
            pieces = torch.split(first.to(device), together), torch.split(shares, together, 1)
            with (progress or SILENT)("writing samples", total=len(pieces[0]) * len(shares)) as tick:
                return torch.cat([_write(writer, *piece, temperature, tick) for piece in zip(*pieces, strict=True)])

        written = with_smaller_batches(write, min(len(first), _TOGETHER), "writing samples")
    return written[:, ahead:].to(like.device)


def _copied(model: nn.Module, dtype: torch.dtype, first: Tensor) -> nn.Module:
    """The model with its parameters in another dtype, as if it had been loaded so: buffers keep theirs.

    The model itself where the copy cannot read two tokens: some mix their parameters with buffers of one dtype only.

    Args:
        model: not changed.
        dtype: of the copy's parameters.
        first: (1, 1) int64, a token that it knows.
    """
    parameters = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()}
    copied: nn.Module = copy.deepcopy(model, dict(parameters))
    try:
        copied(input_ids=first.expand(1, 2).to(next(model.parameters()).device), use_cache=False)
    except Exception as error:  # whatever somebody else's model makes of it
        if is_out_of_memory(error):
            raise
        return model
    return copied


def _beginnings(model: Any, like: Tensor, samples: int, dice: torch.Generator) -> tuple[Tensor, int]:
    """First token of each sample (samples, 1), and how many of the written tokens are dropped again."""
    start = getattr(model.generation_config, "bos_token_id", None)
    # Of a single sample only the start token itself says that it was put there.
    if bool((like[:, 0] == like[0, 0]).all()) and (len(like) > 1 or int(like[0, 0]) == start):
        return like[:1, :1].expand(samples, 1), 0
    if isinstance(start, int) and start < len(model.get_input_embeddings().weight):
        return torch.full((samples, 1), start), 1
    drawn = torch.randint(like.numel(), (samples, 1), generator=dice, device=dice.device)
    return like.flatten()[drawn.to(like.device)], 0


def _write(model: Any, first: Tensor, shares: Tensor, temperature: float, tick: Any) -> Tensor:
    """(samples, 1 + steps) token by token, with a cache where the model can keep one.

    `transformers`' own loop goes over all logits three times more.

    Args:
        model: that writes.
        first: (samples, 1) tokens.
        shares: (steps, samples) float64 between 0 and 1, what is drawn.
        temperature: above 0.
        tick: counts steps.
    """
    end = model.generation_config.eos_token_id
    never = [] if end is None else [end] if isinstance(end, int) else list(end)
    written, cache, caches = [first], None, True
    for share in shares:
        if caches:
            unread = torch.cat(written, 1) if cache is None else written[-1]
            try:
                made = model(input_ids=unread, past_key_values=cache, use_cache=True)
            except Exception as error:  # some cannot keep one, like those whose layers all have a state in its place
                if is_out_of_memory(error):
                    raise
                caches = False
        if not caches:
            made = _uncached(model, torch.cat(written, 1))
        cache = getattr(made, "past_key_values", None)  # some keep none, and read all again
        try:
            written.append(_draw(made.logits[:, -1], temperature, never, share))
        except NumericsError as error:
            raise NumericsError(f"{type(model).__name__} cannot write text: {error}") from error
        tick()
    return torch.cat(written, 1)


def _uncached(model: Any, tokens: Tensor) -> Any:
    try:
        return model(input_ids=tokens, use_cache=False)
    except Exception as error:  # whatever somebody else's model makes of it
        if is_out_of_memory(error):
            raise
        raise CalibrationError(
            f"{type(model).__name__} cannot write text: {type(error).__name__}: {error}; expected a model that reads "
            f"{tuple(tokens.shape)} tokens and predicts the next: take a recipe without self_calibration, or the "
            "method slimllm"
        ) from error


def _draw(logits: Tensor, temperature: float, never: Sequence[int], shares: Tensor) -> Tensor:
    """(samples, 1) int64, a token for each row, drawn from the softmax of logits / temperature.

    A few rows at a time, so that what is worked out of them stays in the cache.

    Args:
        logits: (samples, vocabulary) in any dtype; probabilities are float32.
        temperature: above 0.
        never: tokens that are not drawn; some configurations name an end that is not in the vocabulary, or -1.
        shares: (samples,) float64 between 0 and 1, drawn for each row, on the device of the logits.

    Raises:
        NumericsError: the probabilities are not finite.
    """
    return torch.cat([_drawn(logits[at].float() / temperature, never, shares[at, None]) for at in row_slices(logits)])


def _drawn(logits: Tensor, never: Sequence[int], shares: Tensor) -> Tensor:
    """A token for each row, where its share of the total is reached: first the block of tokens, then the token.

    Shares reached are float64, so that the last of many tokens has its own.
    """
    logits[:, [token for token in never if 0 <= token < logits.shape[1]]] = -torch.inf
    probabilities = torch.nn.functional.pad(logits.softmax(-1), (0, -logits.shape[1] % _BLOCK))
    blocks = probabilities.reshape(len(logits), -1, _BLOCK)
    reached = blocks.sum(-1).double().cumsum(-1)
    if not torch.isfinite(reached[:, -1]).all():
        raise NumericsError("its probabilities are not finite; check its weights, or run it in bfloat16 or float32")
    wanted = shares * reached[:, -1:]
    block = torch.searchsorted(reached, wanted, right=True)
    inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0].double().cumsum(-1)
    rest = wanted - (reached.take_along_dim(block, 1) - inside[:, -1:])
    return block * _BLOCK + torch.searchsorted(inside, rest, right=True)
