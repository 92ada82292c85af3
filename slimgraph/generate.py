"""Calibration tokens that a model makes up itself, where the text at hand is of one kind only.

What a language model writes when it is given nothing to go on from is a sample of all it was trained on. A fit to it
serves texts that look nothing like the text at hand, and no further text has to be found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimgraph.errors import CalibrationError, NumericsError
from slimgraph.progress import SILENT, Progress
from slimgraph.trace import evaluating

__all__ = ["can_generate", "generate"]

_TOGETHER = 64  # samples that are written at once


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
    progress: Progress | None = None,
) -> Tensor:
    """Samples of the model's own distribution, as long as given ones, by `transformers`' sampling with a cache.

    Where all given samples begin with the same token, so do these. Otherwise they begin after the model's start token,
    or, where it names none that it has, with a token that is drawn from the given ones. No sample ends early.

    Args:
        model: a model that `can_generate`; not changed.
        like: (n, tokens) int64, given samples.
        samples: how many to write.
        temperature: above 0; 1 is the model's own distribution.
        dtype: in which it runs, under autocast; its own by default.
        seed: of the sampling; the global random state stays as it is.
        progress: shows how far it got.

    Returns:
        (samples, tokens) int64, on the device of `like`.

    Raises:
        CalibrationError: the model cannot generate.
        NumericsError: its probabilities are not finite.
    """
    if not can_generate(model):
        raise CalibrationError(
            f"{type(model).__name__} has no `generate` of transformers; expected a model that can write text: "
            "calibrate with given text only"
        )
    device = next(model.parameters()).device
    length = like.shape[1]
    on_gpu = [device] if device.type == "cuda" else []
    lower = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with torch.random.fork_rng(on_gpu), evaluating(model), lower:
        torch.manual_seed(seed)
        first, ahead = _beginnings(model, like, samples)
        pieces = torch.split(first.to(device), _TOGETHER)
        with (progress or SILENT)("writing samples", total=len(pieces) * length) as tick:
            try:
                written = [_write(model, piece, length + ahead, temperature, tick) for piece in pieces]
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise NumericsError(
                    f"{type(model).__name__} cannot write text, its probabilities are not finite: {error}; check its "
                    "weights, or run it in bfloat16 or float32"
                ) from error
    return torch.cat(written)[:, ahead:].to(like.device)


def _beginnings(model: Any, like: Tensor, samples: int) -> tuple[Tensor, int]:
    """First token of each sample (samples, 1), and how many of the written tokens are dropped again."""
    start = getattr(model.generation_config, "bos_token_id", None)
    # Of a single sample only the start token itself says that it was put there.
    if bool((like[:, 0] == like[0, 0]).all()) and (len(like) > 1 or int(like[0, 0]) == start):
        return like[:1, :1].expand(samples, 1), 0
    if isinstance(start, int) and start < len(model.get_input_embeddings().weight):
        return torch.full((samples, 1), start), 1
    return like.flatten()[torch.randint(like.numel(), (samples, 1))], 0


def _write(model: Any, first: Tensor, length: int, temperature: float, tick: Any) -> Tensor:
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Ticking(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            tick()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    end = model.generation_config.eos_token_id
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    written: Tensor = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([Ticking()]),
    )
    return written
