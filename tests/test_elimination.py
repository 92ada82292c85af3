"""Backward elimination against exactly solved losses."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from decoders import make, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import RawSite, random_site, sites
from torch import Tensor

import slimgraph
from slimgraph.eliminate import Left, eliminate, removal_costs, swap
from slimgraph.errors import CalibrationError, NumericsError, PlanError, RecipeError
from slimgraph.passes import Elimination, LeastSquares, Sweep, UniformAllocation
from slimgraph.recipe import Recipe

fast = settings(max_examples=25, deadline=None)
PRIORS = [0.5, 30.0, 4096.0]

# -- references -------------------------------------------------------------------------------------------------------


def solved(site: RawSite, channels: Tensor, prior: float) -> tuple[Tensor, float]:
    """The best weight on these channels and its loss, by rows for the tokens and rows for the prior."""
    x = site.x - site.x.mean(0)
    strength = (prior * x.square().mean()).sqrt()
    rows = torch.cat([x[:, channels], strength * torch.eye(len(channels), dtype=torch.float64)])
    wanted = torch.cat([x @ site.weight.T, strength * site.weight[:, channels].T])
    weight = torch.linalg.lstsq(rows, wanted).solution
    return weight.T, float((wanted - rows @ weight).square().sum())


def loss(site: RawSite, units: list[int], prior: float) -> float:
    return solved(site, site.evidence().kept_channels(torch.tensor(units, dtype=torch.long)), prior)[1]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


@fast
@given(site=sites(30, 2), prior=st.sampled_from(PRIORS), data=st.data())
def test_a_cost_is_the_difference_of_exactly_solved_losses(site: RawSite, prior: float, data: st.DataObject) -> None:
    left = Left(site.evidence(), prior)
    gone = data.draw(st.lists(st.sampled_from(site.all_units), unique=True, max_size=len(site.blocks) - 1))
    if gone:
        left.remove(torch.tensor(gone))
    here = [u for u in site.all_units if u not in gone]
    before = loss(site, here, prior)
    expected = [loss(site, [u for u in here if u != unit], prior) - before for unit in here]
    found = left.costs()
    assert found[here].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert all(math.isinf(found[u]) for u in gone)


@fast
@given(site=sites(30, 2), prior=st.sampled_from(PRIORS), data=st.data())
def test_what_is_left_is_the_best_fit(site: RawSite, prior: float, data: st.DataObject) -> None:
    left = Left(site.evidence(), prior)
    order = data.draw(st.permutations(site.all_units))[: len(site.blocks) - 1]
    for some in (order[:2], order[2:]):  # several at once, and one lot after the other
        if some:
            left.remove(torch.tensor(some))
    channels = site.evidence().kept_channels(torch.tensor([u for u in site.all_units if u not in order]))
    assert left.channels.equal(channels)
    close(left.weight, solved(site, channels, prior)[0])
    x = site.x[:, channels] - site.x.mean(0)[channels]
    system = x.T @ x + left.shift * torch.eye(len(channels), dtype=torch.float64)
    close(left.inverse @ system, torch.eye(len(channels), dtype=torch.float64))


@fast
@given(site=sites(30, 2), prior=st.sampled_from(PRIORS), data=st.data())
def test_what_comes_back_is_as_if_it_had_never_gone(site: RawSite, prior: float, data: st.DataObject) -> None:
    left = Left(site.evidence(), prior)
    gone = data.draw(st.lists(st.sampled_from(site.all_units), unique=True, min_size=1, max_size=len(site.blocks) - 1))
    left.remove(torch.tensor(gone))
    before = loss(site, left.units.tolist(), prior)
    gains = left.gains()
    for unit in site.all_units:
        after = loss(site, sorted([*left.units.tolist(), unit]), prior)
        assert float(gains[unit]) == (pytest.approx(before - after, rel=1e-6, abs=1e-6) if unit in gone else -math.inf)
    left.add(torch.tensor(gone))
    again = Left(site.evidence(), prior)
    assert left.channels.equal(again.channels)
    close(left.weight, again.weight)
    close(left.inverse, again.inverse)


# -- swaps ------------------------------------------------------------------------------------------------------------


@fast
@given(site=sites(30, 2), prior=st.sampled_from(PRIORS), data=st.data())
def test_a_swap_is_made_where_the_exactly_solved_loss_is_smaller(
    site: RawSite, prior: float, data: st.DataObject
) -> None:
    block = int(site.blocks.max()) + 1
    keep = data.draw(st.integers(1, len(site.blocks) // block))
    start = sorted(u for b in range(block) for u in (site.blocks == b).nonzero().flatten().tolist()[:keep])
    left = Left(site.evidence(), prior)
    gone = [u for u in site.all_units if u not in start]
    if gone:
        left.remove(torch.tensor(gone))
    gains = left.gains()
    made = swap(left, site.blocks, 1)
    if not gone:
        assert made == 0
        return
    back = max(gone, key=lambda u: float(gains[u]))
    rivals = [u for u in start if site.blocks[u] == site.blocks[back]]
    losses = {tuple(sorted({*start, back} - {u})): u for u in [back, *rivals]}
    found = {units: loss(site, list(units), prior) for units in losses}
    assert found[tuple(left.units.tolist())] == pytest.approx(min(found.values()), rel=1e-6, abs=1e-6)
    assert made == (left.units.tolist() != start)


def test_only_swaps_are_counted() -> None:
    """A unit that is taken back and goes again is none, even where it costs less than nothing under a strong prior."""
    counts = []
    for seed in range(60):
        site = random_site(seed, blocks=1, block_size=3, width=1, tokens=14)
        left = Left(site.evidence(), 300.0)
        left.remove(torch.tensor([1, 2]))
        made = swap(left, site.blocks, 1)
        assert made == (left.units.tolist() != [0])
        counts.append(made)
    assert set(counts) == {0, 1}


@pytest.mark.parametrize("width", [1, 2])
def test_swaps_make_the_loss_smaller_and_never_larger(width: int) -> None:
    changed = 0
    for seed in range(12):
        site = random_site(seed, blocks=2, block_size=6, width=width, tokens=40)
        kept = {n: eliminate(site.evidence(), 3, prior=0.5, steps=1, swaps=n).tolist() for n in (0, 50)}
        before, after = (loss(site, units, 0.5) for units in kept.values())
        assert after <= before * (1 + 1e-9)
        assert torch.bincount(site.blocks[kept[50]]).tolist() == [3, 3]
        changed += after < before * (1 - 1e-6)
    assert changed


# -- the choice -------------------------------------------------------------------------------------------------------


@fast
@given(site=sites(30, 2), prior=st.sampled_from([*PRIORS, math.inf]), steps=st.integers(1, 20), data=st.data())
def test_every_block_keeps_as_many(site: RawSite, prior: float, steps: int, data: st.DataObject) -> None:
    size = len(site.blocks) // (int(site.blocks.max()) + 1)
    keep = data.draw(st.integers(1, size))
    kept = eliminate(site.evidence(), keep, prior=prior, steps=steps)
    assert kept.equal(kept.unique())
    assert torch.bincount(site.blocks[kept]).tolist() == [keep] * (int(site.blocks.max()) + 1)


@fast
@given(site=sites(30, 2, width=2), prior=st.sampled_from(PRIORS))
def test_the_cheapest_goes_first_and_the_others_make_up_for_it(site: RawSite, prior: float) -> None:
    size = len(site.blocks) // (int(site.blocks.max()) + 1)
    here = site.all_units
    while len(here) > int(site.blocks.max()) + 1:
        counts = torch.bincount(site.blocks[here])
        may = [u for u in here if counts[site.blocks[u]] > 1]
        worst = min(may, key=lambda unit: loss(site, [u for u in here if u != unit], prior))
        here = [u for u in here if u != worst]
        if len(set(torch.bincount(site.blocks[here]).tolist())) == 1 and int(site.blocks.max()) == 0:
            assert eliminate(site.evidence(), len(here), prior=prior).tolist() == here
    assert eliminate(site.evidence(), 1, prior=prior).tolist() == here
    assert eliminate(site.evidence(), size, prior=prior).tolist() == site.all_units


def test_more_steps_see_what_has_gone() -> None:
    """Of two channels that are the same one can go for nothing, and both for a lot."""
    site = random_site(0, blocks=1, block_size=4, width=1, tokens=200)
    first, second = (int((site.units == unit).nonzero()) for unit in (1, 3))
    site.x[:, second] = site.x[:, first]
    costs = removal_costs(site.evidence(), 1e-6)
    assert sorted(costs.argsort()[:2].tolist()) == [1, 3]
    assert eliminate(site.evidence(), 2, prior=1e-6, steps=1).tolist() == [0, 2]
    kept = eliminate(site.evidence(), 2, prior=1e-6, steps=2).tolist()
    assert len({1, 3} & set(kept)) == 1


def test_it_is_better_than_what_it_is_compared_with() -> None:
    """Near the best set of all, and never worse than ranking once, over many sites."""
    ours = once = best = 0.0
    for seed in range(20):
        site = random_site(seed, blocks=1, block_size=8, width=1, tokens=80)
        ours += loss(site, eliminate(site.evidence(), 4, prior=1.0).tolist(), 1.0)
        once += loss(site, eliminate(site.evidence(), 4, prior=math.inf).tolist(), 1.0)
        best += min(loss(site, list(c), 1.0) for c in itertools.combinations(range(8), 4))
    assert best <= ours < 1.15 * best
    assert ours < 0.9 * once


@fast
@given(site=sites(30, 2))
def test_without_a_fit_a_unit_is_worth_variance_times_squared_norm(site: RawSite) -> None:
    terms = site.x.var(0, correction=0) * site.weight.square().sum(0) * len(site.x)
    expected = [float(terms[site.units == unit].sum()) for unit in site.all_units]
    assert removal_costs(site.evidence(), math.inf).tolist() == pytest.approx(expected)
    one = RawSite(site.x, site.weight, site.bias, site.units, torch.zeros_like(site.blocks))
    order = sorted(site.all_units, key=lambda u: expected[u])
    assert eliminate(one.evidence(), 2, prior=math.inf).tolist() == sorted(order[-2:])


@pytest.mark.parametrize("prior", [0.0, 10.0, 1e5])
def test_channels_that_are_orthogonal_go_in_the_order_of_variance_times_squared_norm(prior: float) -> None:
    site = random_site(2, blocks=1, block_size=10, width=1, tokens=40)
    centred = site.x - site.x.mean(0)
    basis, _ = torch.linalg.qr(centred)
    scales = torch.linspace(1.0, 3.0, 10, dtype=torch.float64)
    orthogonal = RawSite(basis * scales + 1.0, site.weight, site.bias, site.units, site.blocks)
    by_channel = scales.square() * site.weight.square().sum(0)
    expected = torch.empty_like(by_channel)
    expected[site.units] = by_channel
    close(removal_costs(orthogonal.evidence(), prior), expected)
    for keep in (1, 4, 9):
        best = expected.argsort(descending=True)[:keep].sort().values
        assert eliminate(orthogonal.evidence(), keep, prior=prior).equal(best)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_channels_that_do_not_vary_cost_nothing() -> None:
    site = random_site(0)
    site.x[:] = 2.0
    assert not removal_costs(site.evidence()).any()
    assert len(eliminate(site.evidence(), 1)) == 2


@pytest.mark.parametrize("keep", [0, 4])
def test_what_cannot_be_kept_is_refused(keep: int) -> None:
    message = f"cannot keep {keep} units of each block: the smallest block has 3, and 1 must stay"
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        eliminate(random_site(0).evidence(), keep)


@pytest.mark.parametrize("prior", [10.0, math.inf])
def test_bad_numbers_are_refused_by_name(prior: float) -> None:
    for broken in ("weight", "x"):
        site = random_site(0)
        getattr(site, broken)[1, 2] = math.nan
        with pytest.raises(NumericsError, match=r"layers\.7"):
            eliminate(site.evidence("layers.7"), 1, prior=prior)


def test_tokens_are_needed() -> None:
    with pytest.raises(CalibrationError, match="no tokens"):
        eliminate(random_site(0, tokens=0).evidence(), 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prior": -1.0}, "elimination: prior is -1.0; expected a number of tokens, at least 0"),
        ({"prior": math.nan}, "elimination: prior is nan; expected a number of tokens, at least 0"),
        ({"steps": 0}, "elimination: steps is 0; expected at least 1"),
        ({"swaps": -1}, "elimination: swaps is -1; expected at least 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        Elimination(**fields)


# -- in a recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["kv", "balanced"])
def test_a_recipe_with_it_prunes(heads: str) -> None:
    allocation = UniformAllocation(ratio=0.2, heads=heads, round_to=1)
    recipe = Recipe((Elimination(prior=64.0, steps=3), LeastSquares(), allocation, Sweep()))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    model = make(num_hidden_layers=3)
    result = slimgraph.prune(model, tokens(6, 9, seed=3), recipe=recipe, verify=True, keep_scores=True)
    assert result.model is not None
    assert result.plan.cuts
    assert result.scores is not None
    assert all(s.isfinite().all() for s in result.scores.values())
