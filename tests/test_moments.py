from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimgraph.errors import CalibrationError, NumericsError
from slimgraph.moments import Moments, Norms

fast = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(a: Moments, b: Moments, rtol: float = 1e-10) -> None:
    assert a.count == b.count
    scale = float(b.scatter.abs().max()) + 1e-300
    torch.testing.assert_close(a.mean, b.mean, rtol=rtol, atol=rtol * float(b.mean.abs().max()))
    torch.testing.assert_close(a.scatter, b.scatter, rtol=rtol, atol=rtol * scale)


@fast
@given(seed=seeds, tokens=st.integers(1, 30), channels=st.integers(1, 6), offset=st.sampled_from([0.0, 3.0, -40.0]))
def test_statistics_equal_their_definitions(seed: int, tokens: int, channels: int, offset: float) -> None:
    x = randn(seed, tokens, channels) + offset
    moments = Moments.of(x)
    centred = x - x.mean(0)
    assert moments.count == tokens
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(moments.mean, x.mean(0), **close)
    torch.testing.assert_close(moments.scatter, centred.T @ centred, **close)
    torch.testing.assert_close(moments.covariance, centred.T @ centred / tokens, **close)
    torch.testing.assert_close(moments.gram, x.T @ x, **close)
    torch.testing.assert_close(moments.norms, x.norm(dim=0), **close)
    torch.testing.assert_close(moments.norms, moments.gram.diagonal().sqrt(), **close)
    torch.testing.assert_close(Norms.of(x).norms, x.norm(dim=0), **close)


@pytest.mark.parametrize("channels", [255, 256, 257, 600])
def test_wide_inputs_have_all_their_products(channels: int) -> None:
    x = randn(0, 20, channels)
    centred = x - x.mean(0)
    torch.testing.assert_close(Moments.of(x).scatter, centred.T @ centred, rtol=1e-10, atol=1e-10)


@fast
@given(seed=seeds, sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), offset=st.sampled_from([0.0, 100.0]))
def test_shards_add_up_to_the_whole(seed: int, sizes: list[int], offset: float) -> None:
    x = randn(seed, sum(sizes), 4) + offset
    shards = x.split(sizes)
    streamed, merged = Moments.empty(4), Moments.empty(4)
    norms, merged_norms = Norms.empty(4), Norms.empty(4)
    for shard in shards:
        streamed.update(shard)
        merged = Moments.of(shard).merge(merged)
        norms.update(shard)
        merged_norms = merged_norms.merge(Norms.of(shard))
    if not len(x):
        assert streamed.count == merged.count == norms.count == 0
        return
    assert_same(streamed, Moments.of(x))
    assert_same(merged, Moments.of(x))
    torch.testing.assert_close(norms.norms, x.norm(dim=0))
    torch.testing.assert_close(merged_norms.norms, x.norm(dim=0))
    assert norms.count == merged_norms.count == len(x)


def test_merge_leaves_both_as_they_were() -> None:
    a, b = Moments.of(randn(0, 5, 3)), Moments.of(randn(1, 4, 3))
    merged = a.merge(b)
    assert_same(a, Moments.of(randn(0, 5, 3)))
    assert_same(b, Moments.of(randn(1, 4, 3)))
    merged.update(randn(2, 3, 3))
    assert a.count == 5
    assert_same(a.merge(Moments.empty(3)), a)
    assert_same(Moments.empty(3).merge(a), a)


@pytest.mark.parametrize("shape", [(24, 3), (4, 6, 3), (2, 3, 4, 3)])
def test_leading_shape_does_not_matter(shape: tuple[int, ...]) -> None:
    x = randn(0, 24, 3)
    assert_same(Moments.of(x.reshape(shape)), Moments.of(x))
    torch.testing.assert_close(Norms.of(x.reshape(shape)).norms, Norms.of(x).norms)


def test_a_single_row_without_leading_shape() -> None:
    moments = Moments.of(torch.tensor([1.0, 2.0]))
    assert moments.count == 1
    assert moments.mean.tolist() == [1.0, 2.0]
    assert not moments.scatter.any()


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e5])
def test_badly_centred_float32_keeps_its_accuracy(mean: float) -> None:
    x = (randn(0, 4000, 4) + mean).float()
    exact = x.double()
    centred = exact - exact.mean(0)
    moments = Moments.empty(4)
    for batch in x.split(1000):
        moments.update(batch)
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-12, atol=1e-7)
    # relative to the variance, whatever the mean
    assert float((moments.covariance - centred.T @ centred / len(x)).abs().max()) < 1e-6
    torch.testing.assert_close(moments.norms, exact.norm(dim=0), rtol=5e-7, atol=0)  # some ulps of float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_dtypes_are_upcast_first(dtype: torch.dtype) -> None:
    x = randn(0, 300, 4, dtype=dtype)
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    assert_same(moments, Moments.of(x.double()), rtol=1e-5)
    norms = Norms.of(x)
    assert norms.squares.dtype == torch.float64
    torch.testing.assert_close(norms.norms, x.double().norm(dim=0), rtol=1e-6, atol=0)


def test_large_half_precision_values_do_not_overflow() -> None:
    x = torch.full((10, 2), 6e4, dtype=torch.float16)
    torch.testing.assert_close(Norms.of(x).norms, x.double().norm(dim=0))
    torch.testing.assert_close(Moments.of(x).norms, x.double().norm(dim=0))


@pytest.mark.parametrize("value", [0.1, 1e3 + 0.1, -7.0])
def test_constant_channels_do_not_vary(value: float) -> None:
    x = torch.full((1000, 2), value)
    moments = Moments.of(x)
    torch.testing.assert_close(moments.covariance, torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(moments.norms, x.double().norm(dim=0))


def test_a_scatter_rounded_below_zero_counts_as_zero() -> None:
    scatter = torch.tensor([[-1e-20]], dtype=torch.float64)
    assert Moments(5, torch.zeros(1, dtype=torch.float64), scatter).norms.tolist() == [0.0]


@fast
@given(seed=seeds, index=st.lists(st.integers(0, 4), max_size=6))
def test_restrict_is_moments_of_the_chosen_channels(seed: int, index: list[int]) -> None:
    x = randn(seed, 12, 5)
    chosen = torch.tensor(index, dtype=torch.int64)
    restricted = Moments.of(x).restrict(chosen)
    assert restricted.count == 12
    torch.testing.assert_close(restricted.scatter, Moments.of(x[:, chosen]).scatter)
    torch.testing.assert_close(restricted.mean, x[:, chosen].mean(0))


@pytest.mark.parametrize("statistic", ["covariance", "gram", "norms"])
def test_no_tokens_no_statistics(statistic: str) -> None:
    with pytest.raises(CalibrationError, match="no tokens"):
        getattr(Moments.empty(3), statistic)


def test_no_tokens_no_norms() -> None:
    norms = Norms.empty(3)
    norms.update(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="no tokens"):
        _ = norms.norms


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("kind", [Moments, Norms])
def test_bad_values_are_refused_and_change_nothing(kind: type[Moments | Norms], bad: float) -> None:
    x = randn(0, 6, 3, dtype=torch.float32)
    statistics = kind.of(x)
    poisoned = x.clone()
    poisoned[4, 1] = bad
    with pytest.raises(NumericsError, match="channel 1"):
        statistics.update(poisoned)
    assert statistics.count == 6
    torch.testing.assert_close(statistics.norms, x.double().norm(dim=0))


@pytest.mark.parametrize("kind", [Moments, Norms])
@pytest.mark.parametrize("x", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(())])
def test_wrong_shapes_and_dtypes_are_refused(kind: type[Moments | Norms], x: Tensor) -> None:
    with pytest.raises(ValueError, match="expected floating-point activations"):
        kind.empty(3).update(x)


def test_no_autograd_graph_is_kept() -> None:
    x = randn(0, 6, 3).requires_grad_()
    assert not Moments.of(x).scatter.requires_grad
    assert not Norms.of(x).squares.requires_grad
