from __future__ import annotations

import dataclasses

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import RawSite, cases, random_site
from torch import Tensor

from slimgraph import recover
from slimgraph.errors import CalibrationError, NumericsError

fast = settings(max_examples=25, deadline=None)


def dense_output(site: RawSite) -> Tensor:
    y = site.x @ site.weight.T
    return y if site.bias is None else y + site.bias


def errors(site: RawSite, channels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(out,) sum of squared errors of the recovered output."""
    return (dense_output(site) - site.x[:, channels] @ weight.T - bias).square().sum(0)


@fast
@given(case=cases())
def test_regression_equals_polyfit_on_activations(case: tuple[RawSite, Tensor]) -> None:
    site, channels = case
    weight, bias = recover.regression(site.evidence(), channels)
    expected_weight, expected_bias = reference.regression(site, channels)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, expected_bias, rtol=1e-9, atol=1e-9)


@fast
@given(case=cases())
def test_batches_of_different_means_add_up(case: tuple[RawSite, Tensor]) -> None:
    site, channels = case
    drifting = dataclasses.replace(site, x=site.x + torch.linspace(-3, 3, len(site.x), dtype=site.x.dtype)[:, None])
    whole = drifting.evidence()
    in_parts = dataclasses.replace(whole, inputs=list(drifting.x.split([4, 9, len(site.x) - 13])))
    for found, expected in zip(
        recover.regression(in_parts, channels), reference.regression(drifting, channels), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@fast
@given(case=cases(), step=st.sampled_from([-1e-1, -1e-4, 1e-4, 1e-1]))
def test_regression_is_the_least_squares_optimum(case: tuple[RawSite, Tensor], step: float) -> None:
    site, channels = case
    weight, bias = recover.regression(site.evidence(), channels)
    best = errors(site, channels, weight, bias)
    slack = 1e-10 * dense_output(site).square().sum(0)
    assert (errors(site, channels, weight * (1 + step), bias) >= best - slack).all()
    assert (errors(site, channels, weight, bias + step) >= best - slack).all()
    # and so it is no worse than the simpler recoveries, which are points of the same search space
    for simpler in (recover.bias_only, recover.none):
        plain, plain_bias = simpler(site.evidence(), channels)
        plain_bias = torch.zeros(len(plain), dtype=plain.dtype) if plain_bias is None else plain_bias
        assert (errors(site, channels, plain, plain_bias) >= best - slack).all()


@fast
@given(case=cases())
def test_means_agree_after_recovery(case: tuple[RawSite, Tensor]) -> None:
    site, channels = case
    for function in (recover.bias_only, recover.regression):
        weight, bias = function(site.evidence(), channels)
        recovered = site.x[:, channels] @ weight.T + bias
        torch.testing.assert_close(recovered.mean(0), dense_output(site).mean(0), rtol=1e-9, atol=1e-9)


@fast
@given(case=cases())
def test_bias_only_and_none_keep_the_columns(case: tuple[RawSite, Tensor]) -> None:
    site, channels = case
    for function in (recover.bias_only, recover.none):
        weight, _ = function(site.evidence(), channels)
        assert weight.equal(site.weight[:, channels])
    _, bias = recover.none(site.evidence(), channels)
    assert (bias is None) == (site.bias is None)
    assert bias is None or bias.equal(site.bias)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [recover.none, recover.bias_only, recover.regression])
def test_keeping_everything_changes_nothing(function, dtype: torch.dtype, with_bias: bool) -> None:
    site = random_site(0, loose=1, bias=with_bias)
    cast = dataclasses.replace(
        site, weight=site.weight.to(dtype), bias=None if site.bias is None else site.bias.to(dtype)
    )
    weight, bias = function(cast.evidence(), torch.arange(site.x.shape[1]))
    torch.testing.assert_close(weight, cast.weight, rtol=1e-12, atol=0)
    if cast.bias is not None:
        assert bias.equal(cast.bias)
    elif bias is not None:
        assert not bias.any()


def test_output_that_does_not_vary_keeps_slope_one() -> None:
    site = random_site(0, out=3, width=1)
    channels = site.evidence().kept_channels(torch.tensor([0, 1]))
    site.x[:, channels] = torch.tensor([0.1, 1e3], dtype=torch.float64)
    weight, bias = recover.regression(site.evidence(), channels)
    expected_weight, expected_bias = recover.bias_only(site.evidence(), channels)
    assert weight.equal(expected_weight)
    torch.testing.assert_close(bias, expected_bias, rtol=0, atol=1e-11)  # of means around a thousand


def test_kept_channels_that_cancel_out_keep_slope_one() -> None:
    for seed in range(10):
        site = random_site(seed, width=1, out=8)
        first, second = (int((site.units == unit).nonzero()) for unit in (0, 1))
        site.x[:, second] = site.x[:, first] * 3
        site.weight[:, second] = site.weight[:, first] / -3
        channels = torch.tensor([first, second])
        weight, _ = recover.regression(site.evidence(), channels)
        assert weight.equal(site.weight[:, channels])


def test_only_dead_output_channels_keep_slope_one() -> None:
    site = random_site(0, out=3)
    channels = site.evidence().kept_channels(torch.tensor([0, 1, 2]))
    site.weight[1, channels] = 0
    weight, bias = recover.regression(site.evidence(), channels)
    expected_weight, expected_bias = reference.regression(site, channels)
    torch.testing.assert_close(weight, expected_weight)
    torch.testing.assert_close(bias, expected_bias)


def test_keeping_nothing_leaves_the_mean() -> None:
    site = random_site(0)
    weight, bias = recover.regression(site.evidence(), torch.zeros(0, dtype=torch.int64))
    assert weight.shape == (5, 0)
    torch.testing.assert_close(bias, dense_output(site).mean(0))


def test_results_have_the_dtype_of_the_weight_and_are_fitted_in_float64() -> None:
    site = random_site(0)
    single = dataclasses.replace(site, weight=site.weight.float(), bias=site.bias.float())
    exact = dataclasses.replace(single, weight=single.weight.double(), bias=single.bias.double())
    channels = torch.tensor([0, 3, 4, 9])
    for function in (recover.none, recover.bias_only, recover.regression):
        weight, bias = function(single.evidence(), channels)
        exact_weight, exact_bias = function(exact.evidence(), channels)
        assert weight.equal(exact_weight.float())
        assert bias.equal(exact_bias.float())


def test_results_share_no_memory_with_the_evidence() -> None:
    site = random_site(0)
    weight, bias = recover.none(site.evidence(), torch.arange(12))
    weight.zero_()
    bias.zero_()
    assert site.weight.any()
    assert site.bias.any()


@pytest.mark.parametrize("function", [recover.bias_only, recover.regression])
def test_fits_need_tokens(function) -> None:
    evidence = dataclasses.replace(random_site(0).evidence(), inputs=[])
    with pytest.raises(CalibrationError, match="no tokens"):
        function(evidence, torch.arange(3))


@pytest.mark.parametrize("function", [recover.none, recover.bias_only, recover.regression])
def test_bad_weights_are_refused_by_name(function) -> None:
    site = random_site(0)
    site.weight[1, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.7"):
        function(site.evidence("layers.7"), torch.arange(3))


@pytest.mark.parametrize("function", [recover.bias_only, recover.regression])
def test_bad_activations_are_refused_by_name(function) -> None:
    site = random_site(0)
    site.x[3, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.7"):
        function(site.evidence("layers.7"), torch.arange(3))
