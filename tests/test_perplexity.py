from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimgraph import perplexity as module
from slimgraph.errors import CalibrationError, EvaluationError, NumericsError
from slimgraph.perplexity import perplexity

MakeModel = Callable[..., nn.Module]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (203,), generator=torch.Generator().manual_seed(1))


def reference(model: Any, tokens: Tensor, seq_len: int) -> list[float]:
    """Loss of each window, as transformers computes it itself."""
    starts = range(0, len(tokens) - seq_len + 1, seq_len)
    rows = [tokens[start : start + seq_len][None] for start in starts]
    with torch.no_grad():
        return [float(model(row, labels=row).loss) for row in rows]


def test_it_is_exp_of_the_mean_loss(tiny_llama: MakeModel, tokens: Tensor) -> None:
    model = tiny_llama()
    losses = torch.tensor(reference(model, tokens, 16), dtype=torch.float64)
    found = perplexity(model, tokens, seq_len=16, batch=5)
    assert found.value == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert (found.windows, found.tokens) == (12, 12 * 15)
    expected_error = found.value * float(losses.std()) / math.sqrt(12)
    assert found.standard_error == pytest.approx(expected_error, rel=1e-3)
    assert found.seconds > 0


def test_neither_batch_nor_chunk_changes_it(
    tiny_llama: MakeModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    whole = perplexity(model, tokens, seq_len=16, batch=100).value
    assert perplexity(model, tokens, seq_len=16, batch=1).value == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 64 * 4)  # four positions at a time, the last three
    assert perplexity(model, tokens, seq_len=16, batch=7).value == pytest.approx(whole, rel=1e-6)


class Uniform(nn.Module):
    """Equal logits, in half precision, as a plain tensor; has no parameters."""

    def forward(self, ids: Tensor) -> Tensor:
        assert not self.training
        return torch.zeros(*ids.shape, 64, dtype=torch.float16)


def test_equal_logits_give_the_size_of_the_vocabulary(tokens: Tensor) -> None:
    model = Uniform().train()
    found = perplexity(model, tokens, seq_len=32)
    assert found.value == pytest.approx(64, rel=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-4)
    assert model.training  # as before


def test_one_window_has_no_standard_error(tokens: Tensor) -> None:
    assert math.isnan(perplexity(Uniform(), tokens, seq_len=128).standard_error)


def test_a_hopeless_model_has_infinite_perplexity(tokens: Tensor) -> None:
    class Wrong(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return -1e4 * torch.nn.functional.one_hot(ids.roll(-1, dims=1), 64).float()

    assert perplexity(Wrong(), tokens, seq_len=16).value == math.inf


def test_too_few_tokens(tokens: Tensor) -> None:
    with pytest.raises(CalibrationError, match="203 tokens found, 256 needed"):
        perplexity(Uniform(), tokens, seq_len=256)
    with pytest.raises(ValueError, match="seq_len >= 2"):
        perplexity(Uniform(), tokens, seq_len=1)


def test_nan_names_the_window(tokens: Tensor) -> None:
    class Breaks(Uniform):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.where((ids == tokens[80]).any(), torch.nan, super().forward(ids))

    first = int((tokens == tokens[80]).nonzero()[0]) // 16
    with pytest.raises(NumericsError, match=f"the loss of window {first} is nan"):
        perplexity(Breaks(), tokens, seq_len=16, batch=1)


class LittleRoom(Uniform):
    """Runs out of memory with more than a few windows."""

    def __init__(self, room: int, error: type[Exception] = MemoryError) -> None:
        super().__init__()
        self.room, self.error, self.seen = room, error, [0]

    def forward(self, ids: Tensor) -> Tensor:
        self.seen.append(len(ids))
        if len(ids) > self.room:
            raise self.error("CUDA out of memory. Tried to allocate more than there is")
        return super().forward(ids)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_smaller_batches_are_tried_when_memory_runs_out(tokens: Tensor, error: type[Exception]) -> None:
    model = LittleRoom(3, error).eval()
    found = perplexity(model, tokens, seq_len=16, batch=16)
    assert found.windows == 12
    assert found.value == pytest.approx(64, rel=1e-6)
    assert model.seen[1:] == [12, 6, 3, 3, 3, 3]


def test_no_room_for_one_window(tokens: Tensor) -> None:
    with pytest.raises(EvaluationError, match="memory ran out with a batch of 1"):
        perplexity(LittleRoom(0), tokens, seq_len=16, batch=4)


def test_other_errors_are_not_mistaken_for_lack_of_memory(tokens: Tensor) -> None:
    model = LittleRoom(0, ValueError)
    with pytest.raises(ValueError, match="CUDA"):
        perplexity(model, tokens, seq_len=16, batch=4)
    assert model.seen[1:] == [4]


def test_a_start_token_stands_before_every_window_and_is_not_predicted(tiny_llama: MakeModel, tokens: Tensor) -> None:
    model = tiny_llama()
    rows = [torch.cat([torch.tensor([7]), tokens[i : i + 15]])[None] for i in range(0, 195, 15)]
    with torch.no_grad():
        losses = torch.tensor([float(model(row, labels=row).loss) for row in rows], dtype=torch.float64)
    found = perplexity(model, tokens, seq_len=16, start=[7], batch=5)
    assert (found.windows, found.tokens) == (13, 13 * 15)
    assert found.value == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert found.value != pytest.approx(perplexity(model, tokens, seq_len=16).value, rel=1e-5)
