"""Feed-forward parts that are written in unusual ways: pruned rightly, or left alone for a reason."""

from __future__ import annotations

import pytest
import torch
from decoders import FeedForward, Toy, tokens
from torch import Tensor, nn
from torch.nn import functional

import slimgraph
from slimgraph.debug.print import inspect
from slimgraph.groups import infer
from slimgraph.passes import BiasOnly, LeastSquares, Magnitude, Sweep, UniformAllocation, Verify
from slimgraph.recipe import Recipe
from slimgraph.trace import trace

IDS = tokens(6, 9, seed=3)
CUT = UniformAllocation(unit_ratio=0.4, round_to=1)


class Odd(FeedForward):
    """Something between its projections, given their names."""

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x).relu() + 0.1))


class SummedNorm(Odd):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True))


class Shares(Odd):
    def between(self, h: Tensor) -> Tensor:
        return h / h.sum(-1, keepdim=True)


class ReadTwice(FeedForward):
    """A second projection reads the units among other values."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(self.up.out_features + 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h) + self.more(torch.cat([h, x], -1))


class TiedBothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12, bias=False)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.up(x).relu(), self.up.weight.t(), self.bias)


class WeightFirst(nn.Module):
    """Channels come last neither in what the projection reads nor in what it puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.weight = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ self.up(x).relu().transpose(1, 2)).transpose(1, 2)


class Transposing(WeightFirst):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,oi->bos", self.up(x).relu(), self.weight).transpose(1, 2)


class Columns(WeightFirst):
    """Only what goes in is columns."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bis,oi->bso", self.up(x).relu().transpose(1, 2), self.weight)


class BiasApart(WeightFirst):
    """The bias is there under the name that a refit would give one, and is added by a node of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.up(x).relu(), self.weight) + self.bias


class TwoSites(nn.Module):
    """Two bare weights in one module, so that both would have their bias in the same place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(8, 10)
        self.one, self.other = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).relu() @ self.one + self.second(x).relu() @ self.other


class OnePlace(TwoSites):
    """A place for the bias of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = None


def model_of(*layers: type[nn.Module]) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(*(layer() for layer in layers))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (SummedNorm, "a mean, variance or sum is taken over its units"),
        (Shares, "a mean, variance or sum is taken over its units"),
        (ReadTwice, "its units are summed at other places as well"),
        (TiedBothWays, "its weight or bias is read at other places as well, and a refit would change it there"),
    ],
)
def test_a_site_that_a_fit_would_not_be_right_for_is_left_alone(layer: type[nn.Module], why: str) -> None:
    model = model_of(layer, FeedForward)
    structure = infer(trace(model))
    site = next(s for s in structure.sites if s.layer == 0)
    assert structure.left_alone(site) == why
    assert [s.layer for s in structure.prunable_sites()] == [1]
    assert f"left alone: {why}" in str(inspect(model))
    result = slimgraph.prune(model, IDS, recipe=Recipe((Magnitude(), BiasOnly(), CUT, Sweep())), verify=True)
    assert {s.layer for s in structure.sites for g in s.groups if g in result.plan.cuts} == {1}


@pytest.mark.parametrize("layer", [WeightFirst, Transposing, Columns])
@pytest.mark.parametrize("length", [8, 9])
def test_a_projection_of_columns_is_left_alone(layer: type[nn.Module], length: int) -> None:
    """Even where there are as many tokens as channels."""
    model = model_of(layer, FeedForward)
    structure = infer(trace(model))
    why = [structure.left_alone(s) for s in structure.sites]
    assert why == ["channels do not come last in what it reads or puts out", None]
    recipe = Recipe((Magnitude(), BiasOnly(), CUT, Sweep(), Verify()))
    assert slimgraph.prune(model, IDS[:, :length], recipe=recipe, verify=True).model is not None


@pytest.mark.parametrize("layer", [FeedForward, BiasApart, TwoSites])
def test_biases_alone_keep_the_mean_of_what_a_layer_puts_out(layer: type[nn.Module]) -> None:
    """A bias that a refit adds takes the place of none that is there, and of none that another refit adds."""
    model = model_of(layer)
    result = slimgraph.prune(model, IDS, recipe=Recipe((Magnitude(), BiasOnly(), CUT, Sweep())), verify=True)
    with torch.no_grad():
        dense, pruned = model(IDS), result.graph(IDS)
    assert not torch.allclose(dense, pruned)
    torch.testing.assert_close(pruned.mean((0, 1)), dense.mean((0, 1)), rtol=0, atol=1e-12)
    assert result.budget is not None
    assert result.budget.parameters_after == result.parameters_after
    named = [site.refit_bias for site in result.structure.sites]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("layer", [BiasApart, TwoSites, OnePlace])
def test_a_module_without_a_place_for_a_bias_is_not_pruned(layer: type[nn.Module]) -> None:
    result = slimgraph.prune(model_of(layer), IDS, recipe=Recipe((Magnitude(), LeastSquares(), CUT, Sweep())))
    assert result.model is None
    assert "recovery adds a bias here" in str(result.module_failure)
