"""Budgets: as many units as the ratio asks for, counted as the pruned model counts them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from decoders import decoder
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from slimgraph.budget import Budget, Goal, at_factor, keep_at, solve
from slimgraph.errors import PlanError
from slimgraph.plan import Plan, resolve
from slimgraph.surgery import Refit, prune_graph
from slimgraph.units import Units, parameter_count, units_of

fast = settings(max_examples=60, deadline=None)

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_hidden_layers": 4, "intermediate_size": 48}),
    ("llama", {}),
    ("gpt2", {}),
]


def goal_for(
    family: str = "llama",
    changes: dict[str, Any] = MODELS[0][1],
    *,
    heads: str = "auto",
    weights: dict[int, float] | None = None,
    adds: bool = False,
    round_to: int = 8,
) -> Goal:
    structure = decoder(family, **changes).structure
    sites = structure.prunable_sites()
    layers = {s.layer for s in sites if s.layer is not None}
    return Goal(
        structure=structure,
        sites=[units_of(structure, s, heads) for s in sites],
        weights=weights if weights is not None else dict.fromkeys(layers, 1.0),
        sizes={n: p.numel() for n, p in structure.analysis.graph_module.named_parameters()},
        added={s.name: 24 for s in sites if adds and s.bias is None},
        round_to=round_to,
    )


@st.composite
def goals(draw: st.DrawFn) -> Goal:
    family, changes = draw(st.sampled_from(MODELS))
    layers = changes.get("num_hidden_layers", 2)
    weights = {
        i: draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0, 3.0])) for i in range(layers) if draw(st.integers(0, 4))
    }
    assume(any(weights.values()))
    return goal_for(
        family,
        changes,
        heads=draw(st.sampled_from(["kv", "balanced", "auto"])),
        weights=weights,
        adds=draw(st.booleans()),
        round_to=draw(st.sampled_from([1, 4, 8])),
    )


def step_of(goal: Goal, units: Units) -> int:
    """By how many units a site's number may change at a time."""
    return 1 if units.site.kind == "heads" or units.block_size <= goal.round_to else goal.round_to


def cost_of_a_step(goal: Goal, units: Units) -> int:
    """Parameters that a site loses with that many units, found by counting."""
    fewer = max(1, units.block_size - step_of(goal, units))
    return sum(goal.sizes.values()) - parameter_count(goal.structure, {units.group: fewer}, goal.sizes)


def reachable(goal: Goal) -> float:
    """The share that goes when every site that may be cut keeps as little as it can."""
    cut = [u for u in goal.sites if goal.weights.get(u.site.layer if u.site.layer is not None else -1, 0) > 0]
    kept = {u.group: step_of(goal, u) for u in cut}
    added = sum(goal.added.get(u.site.name, 0) for u in cut if step_of(goal, u) < u.block_size)
    before = sum(goal.sizes.values())
    return 1 - (parameter_count(goal.structure, kept, goal.sizes) + added) / before


def first_units(units: Units, keep: int) -> torch.Tensor:
    return torch.tensor([b * units.block_size + i for b in range(units.block_count) for i in range(keep)])


def plan_of(goal: Goal, budget: Budget) -> Plan:
    plan = Plan()
    for units in goal.sites:
        plan = plan.merged(Plan(units.cut(first_units(units, budget.keep[units.site.name]))))
    return plan


# -- the ratio --------------------------------------------------------------------------------------------------------


@fast
@given(goal=goals(), share=st.floats(0, 1))
def test_the_ratio_is_met_to_half_a_step_of_one_site(goal: Goal, share: float) -> None:
    assume(reachable(goal) > 0)
    ratio = share * reachable(goal)
    budget = solve(goal, ratio)
    missed = abs(budget.removed - ratio) * budget.parameters_before
    steps = [cost_of_a_step(goal, u) + goal.added.get(u.site.name, 0) for u in goal.sites]
    assert missed <= max(steps) / 2 + 1


@fast
@given(goal=goals(), share=st.floats(0, 1))
def test_parameters_are_counted_as_the_pruned_model_has_them(goal: Goal, share: float) -> None:
    assume(reachable(goal) > 0)
    budget = solve(goal, share * reachable(goal))
    resolved = resolve(goal.structure, plan_of(goal, budget))
    weights = dict(goal.structure.analysis.graph_module.named_parameters())
    real = sum(resolved.select(name, p).numel() for name, p in weights.items())
    real += sum(goal.added.get(u.site.name, 0) for u in goal.sites if budget.keep[u.site.name] < u.block_size)
    assert budget.parameters_after == real
    assert budget.parameters_before == sum(p.numel() for p in weights.values())
    assert budget.removed == pytest.approx(1 - real / budget.parameters_before)


@pytest.mark.parametrize("adds", [True, False])
def test_added_biases_are_real_parameters_of_the_pruned_graph(adds: bool) -> None:
    goal = goal_for(changes={}, adds=adds)
    budget = solve(goal, 0.15)
    resolved = resolve(goal.structure, plan_of(goal, budget))
    refits = {}
    for units in goal.sites:
        weight = resolved.select(
            units.site.parameter, goal.structure.analysis.graph_module.get_parameter(units.site.parameter)
        )
        if budget.keep[units.site.name] < units.block_size:
            refits[units.site.name] = Refit(weight, torch.zeros(len(weight)) if adds else None)
    assert refits
    pruned = prune_graph(resolved, refits)
    assert sum(p.numel() for p in pruned.parameters()) == budget.parameters_after


@fast
@given(goal=goals(), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_ratio_never_leaves_more(goal: Goal, shares: tuple[float, float]) -> None:
    assume(reachable(goal) > 0)
    less, more = (solve(goal, s * reachable(goal)) for s in sorted(shares))
    assert more.parameters_after <= less.parameters_after
    event(f"differ: {more.parameters_after < less.parameters_after}")


@fast
@given(goal=goals(), share=st.floats(0, 1))
def test_units_that_stay_are_allowed_numbers_of_units(goal: Goal, share: float) -> None:
    assume(reachable(goal) > 0)
    budget = solve(goal, share * reachable(goal))
    assert budget.keep.keys() == {u.site.name for u in goal.sites}
    for units in goal.sites:
        keep = budget.keep[units.site.name]
        assert 1 <= keep <= units.block_size
        assert keep == units.block_size or keep % step_of(goal, units) == 0
        if not goal.weights.get(units.site.layer if units.site.layer is not None else -1):
            assert keep == units.block_size


@fast
@given(goal=goals())
def test_nothing_asked_for_is_nothing_cut(goal: Goal) -> None:
    budget = solve(goal, 0.0)
    assert budget.parameters_after == budget.parameters_before
    assert budget.removed == 0
    assert all(budget.keep[u.site.name] == u.block_size for u in goal.sites)


def test_layers_of_equal_weight_lose_nearly_the_same() -> None:
    goal = goal_for(round_to=1)
    budget = solve(goal, 0.2)
    for kind in ("heads", "channels"):
        kept = [budget.keep[u.site.name] for u in goal.sites if u.site.kind == kind]
        assert max(kept) - min(kept) <= 1
    assert len(set(budget.unit_ratios.values())) == 1


def test_a_heavier_layer_loses_more() -> None:
    goal = goal_for(round_to=1, weights={0: 0.5, 1: 1.0, 2: 2.0})
    budget = solve(goal, 0.15)
    channels = [budget.keep[u.site.name] for u in goal.sites if u.site.kind == "channels"]
    assert channels[3] == 48 > channels[0] > channels[1] > channels[2]
    assert budget.unit_ratios[2] == pytest.approx(4 * budget.unit_ratios[0])
    for layer, keep in enumerate(channels[:3]):
        assert keep == pytest.approx(48 * (1 - budget.unit_ratios[layer]), abs=1)


# -- what cannot be reached -------------------------------------------------------------------------------------------


@fast
@given(goal=goals())
def test_an_unreachable_ratio_names_the_largest_reachable_one(goal: Goal) -> None:
    with pytest.raises(PlanError, match=r"^ratio 0\.99 cannot be reached") as caught:
        solve(goal, 0.99)
    named = re.search(r"at most (\d\.\d+)", str(caught.value))
    assert named is not None
    largest = float(named[1])
    assert largest == pytest.approx(reachable(goal), abs=1e-4)
    if largest > 0:
        assert solve(goal, largest).removed == pytest.approx(largest, abs=1e-4)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(PlanError, match=r"expected a share of all parameters, 0 <= ratio < 1$"):
        solve(goal_for(), ratio)


@pytest.mark.parametrize("changes", [{"weights": {}}, {"weights": {0: 0.0}}, {"sites": []}])
def test_without_anything_to_cut_there_is_no_budget(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"^no layer may be cut"):
        solve(dataclasses.replace(goal_for(), **changes), 0.1)


# -- rounding ---------------------------------------------------------------------------------------------------------


@fast
@given(ratio=st.floats(-0.5, 1.5), round_to=st.sampled_from([1, 4, 8, 16, 64]), i=st.integers(0, 7))
def test_a_share_is_rounded_to_the_nearest_allowed_number(ratio: float, round_to: int, i: int) -> None:
    goal = goal_for(round_to=round_to)
    units = goal.sites[i]
    keep, step, n = keep_at(units, ratio, round_to), step_of(goal, units), units.block_size
    allowed = [*range(step, n, step), n]
    exact = n * (1 - min(max(ratio, 0.0), 1.0))
    if ratio <= 0:
        assert keep == n
    else:
        assert keep in allowed
        assert abs(keep - exact) <= step / 2 + 1e-9 or keep == step
    assert keep_at(units, ratio + 0.1, round_to) <= keep


@fast
@given(
    weights=st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=8),
    share=st.floats(0, 1),
)
def test_shares_that_would_be_above_one_leave_the_mean_as_it_is(weights: list[float], share: float) -> None:
    assume(any(weights))
    mean_one = [w * len(weights) / sum(weights) for w in weights]
    most = sum(w > 0 for w in mean_one) / len(mean_one)
    goal = goal_for(weights=dict(enumerate(mean_one)))
    found = sum(at_factor(goal, share).unit_ratios.values()) / len(mean_one)
    assert found == pytest.approx(min(share, most), abs=1e-6)


@pytest.mark.parametrize("tiny", [1e-30, 1e-200])
def test_next_to_no_weight_is_none(tiny: float) -> None:
    none, next_to_none = (goal_for(weights={0: 1.0, 1: 0.9, 2: each, 3: each}, round_to=1) for each in (0.0, tiny))
    assert solve(next_to_none, 0.2).keep == solve(none, 0.2).keep


def test_a_factor_is_the_share_of_units_that_goes() -> None:
    goal = goal_for(round_to=1, weights={0: 1.0, 1: 0.5, 2: 4.0})
    budget = at_factor(goal, 0.25)
    assert budget.unit_ratios == {0: 0.25, 1: 0.125, 2: 1.0}
    channels = [budget.keep[u.site.name] for u in goal.sites if u.site.kind == "channels"]
    assert channels == [36, 42, 1, 48]
    kept = {u.group: budget.keep[u.site.name] for u in goal.sites}
    assert budget.parameters_after == parameter_count(goal.structure, kept, goal.sizes)
