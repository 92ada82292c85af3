"""Measured harm, budgets by it, and the project's own method from end to end."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import VOCABULARY, decoder, logits, make, own_graph, tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slimgraph
from slimgraph import harm, recover, score
from slimgraph.budget import Goal, solve_curves
from slimgraph.errors import CalibrationError, NumericsError, PlanError, RecipeError
from slimgraph.evidence import Evidence
from slimgraph.groups import infer
from slimgraph.passes import (
    FeatureSpace,
    HarmAllocation,
    LeastSquares,
    Magnitude,
    NoRecovery,
    Pass,
    Pearson,
    Sweep,
    base,
)
from slimgraph.recipe import Recipe, method
from slimgraph.state import KEY, State, attach
from slimgraph.surgery import Refit
from slimgraph.sweep import Decision
from slimgraph.trace import tensor_at, trace
from slimgraph.units import Units, parameter_count, units_of

IDS = tokens(6, 9, seed=3)
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma3"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def sites_of(family: str) -> list[Units]:
    structure = decoder(family).structure
    return [units_of(structure, s) for s in structure.prunable_sites()]


def plain(units: Units, evidence: Evidence, keep: int) -> Decision:
    """The units with the largest weights, as they are."""
    kept = score.select_top(score.magnitude(evidence), evidence.blocks, keep)
    channels = evidence.kept_channels(kept)
    return Decision(kept, channels, Refit(*recover.none(evidence, channels)))


def cut_by_hand(model: nn.Module, *cuts: tuple[Units, Decision]) -> nn.Module:
    """The model with the channels that go multiplied by zero."""
    cut = copy.deepcopy(model)
    for units, decision in cuts:
        site = units.site
        weight = tensor_at(cut, site.parameter)
        whole = torch.zeros(weight.shape[site.out_dim], site.channels, dtype=weight.dtype)
        whole[:, decision.channels] = decision.refit.weight
        with torch.no_grad():
            weight.copy_(whole if site.in_dim == 1 else whole.T)
            if decision.refit.bias is not None and site.bias is not None:
                tensor_at(cut, site.bias).copy_(decision.refit.bias)
    return cut


def divergence(dense: nn.Module, cut: nn.Module, ids: Tensor, power: float) -> float:
    """Power mean of the KL divergence at every fourth position, by definition."""
    p, q = (torch.distributions.Categorical(logits=logits(m, ids)[:, ::4]) for m in (dense, cut))
    return float(torch.distributions.kl_divergence(p, q).pow(power).mean().pow(1 / power))


# -- harm -------------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A decoder that can never say its last three tokens."""

    def __init__(self, inner: nn.Module, value: float) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        mask = torch.zeros(VOCABULARY, dtype=torch.float64)
        mask[-3:] = value
        self.register_buffer("mask", mask)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.inner(input_ids=input_ids, use_cache=use_cache).logits + self.mask  # type: ignore[no-any-return]


def library(model: nn.Module, **options: Any) -> harm.Library:
    """One narrow cut of each site."""
    structure = infer(trace(model))
    units = [units_of(structure, s) for s in structure.prunable_sites()]
    return harm.measure(structure, [IDS], units, {u.site.name: [1] for u in units}, plain, **options)


def test_a_token_that_is_ruled_out_does_no_harm() -> None:
    ruled_out, unlikely = (library(Masked(make(), value)) for value in (-math.inf, -1e4))
    assert ruled_out.keys() == unlikely.keys()
    for site, found in ruled_out.items():
        assert found[1] == pytest.approx(unlikely[site][1], rel=1e-6)
        assert found[1] > 0


def test_a_cut_whose_logits_are_no_numbers_is_named() -> None:
    units = sites_of("llama")

    def overflowing(u: Units, evidence: Evidence, keep: int) -> Decision:
        decision = plain(u, evidence, keep)
        weight = decision.refit.weight * (math.inf if u is units[-1] else 1.0)
        return replace(decision, refit=replace(decision.refit, weight=weight))

    widths = {u.site.name: [1] for u in units}
    message = rf"^{re.escape(units[-1].site.name)} cut to 1: its harm is nan"
    with pytest.raises(NumericsError, match=message):
        harm.measure(decoder().structure, [IDS], units, widths, overflowing)


def test_a_dense_model_whose_logits_are_no_numbers_is_refused() -> None:
    with pytest.raises(NumericsError, match="the dense model's logits are not finite"):
        library(Masked(make(), math.inf))


def test_it_makes_no_difference_how_many_samples_go_together() -> None:
    units = sites_of("llama")
    widths = {u.site.name: [1] for u in units}
    one, several = (
        harm.measure(decoder().structure, batches, units, widths, plain, tokens=4 * IDS.shape[1])
        for batches in ([IDS], IDS.split(1))
    )
    for site, found in one.items():
        assert found[1] == pytest.approx(several[site][1], rel=1e-6)


@every_family
def test_a_cut_that_changes_nothing_does_no_harm(family: str) -> None:
    units = sites_of(family)
    widths = {u.site.name: [u.block_size] for u in units}
    found = harm.measure(decoder(family).structure, IDS.split(2), units, widths, plain)
    assert found.keys() == widths.keys()
    for u in units:
        assert found[u.site.name][u.block_size] == pytest.approx(0, abs=1e-12)


@every_family
@pytest.mark.parametrize(("batch", "count", "power"), [(6, 6, 2.0), (6, 2, 1.0), (3, 3, 2.0), (1, 1, 3.0)])
def test_harm_is_the_divergence_of_the_model_cut_by_hand(family: str, batch: int, count: int, power: float) -> None:
    made, units = decoder(family), sites_of(family)
    widths = {u.site.name: [1, u.block_size - 1] for u in units}
    decisions: dict[tuple[str, int], Decision] = {}

    def decide(u: Units, evidence: Evidence, keep: int) -> Decision:
        decisions[u.site.name, keep] = plain(u, evidence, keep)
        return decisions[u.site.name, keep]

    found = harm.measure(
        made.structure, IDS.split(batch), units, widths, decide, tokens=9 * count, power=power, together=False
    )
    for u in units:
        for keep in set(widths[u.site.name]):
            cut = cut_by_hand(made.model, (u, decisions[u.site.name, keep]))
            expected = divergence(made.model, cut, IDS[:count], power)
            assert found[u.site.name][keep] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert expected > 1e-6


@every_family
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_harms_of_a_kind_add_up_to_what_its_cuts_do_together(family: str, power: float) -> None:
    made = decoder(family, **FINE[family])
    units = [units_of(made.structure, s) for s in made.structure.prunable_sites()]
    # The second site, channels, has no second width: levels count from the narrowest.
    widths = {u.site.name: sorted({1, 1 if u is units[1] else u.block_size - 1}, reverse=True) for u in units}
    decisions: dict[tuple[str, int], Decision] = {}

    def decide(u: Units, evidence: Evidence, keep: int) -> Decision:
        decisions[u.site.name, keep] = plain(u, evidence, keep)
        return decisions[u.site.name, keep]

    def measured(together: bool) -> harm.Library:
        return harm.measure(made.structure, [IDS], units, widths, decide, tokens=99, power=power, together=together)

    found, alone = measured(True), measured(False)
    for kind, rank in itertools.product({u.site.kind for u in units}, (0, 1)):
        mine = [(u, sorted(widths[u.site.name])) for u in units if u.site.kind == kind]
        level = [(u, tried[rank]) for u, tried in mine if rank < len(tried)]
        if not level:  # blocks of two heads have one width only
            continue
        cut = cut_by_hand(made.model, *((u, decisions[u.site.name, k]) for u, k in level))
        expected = divergence(made.model, cut, IDS, power)
        assert sum(found[u.site.name][k] for u, k in level) == pytest.approx(expected, rel=1e-3)
        factors = [found[u.site.name][k] / alone[u.site.name][k] for u, k in level]
        assert factors == pytest.approx([factors[0]] * len(level))
        assert factors[0] != pytest.approx(1, rel=1e-3)


def test_cuts_are_decided_from_all_tokens_of_the_dense_model() -> None:
    made, units = decoder(), sites_of("llama")
    seen: dict[str, tuple[int, Tensor]] = {}

    def decide(u: Units, evidence: Evidence, keep: int) -> Decision:
        seen[u.site.name] = evidence.count, evidence.mean
        local, dense = evidence.crossed("local"), evidence.crossed("stream")
        torch.testing.assert_close(local.scatter, dense.scatter)
        return plain(u, evidence, keep)

    harm.measure(made.structure, IDS.split(2), units, {u.site.name: [1] for u in units}, decide, tokens=9)
    for u in units:
        inputs: list[Tensor] = []
        owner = made.model.get_submodule(u.site.parameter.rpartition(".")[0])
        handle = owner.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0]))
        logits(made.model, IDS)
        handle.remove()
        count, mean = seen[u.site.name]
        assert count == IDS.numel()
        torch.testing.assert_close(mean, inputs[0].flatten(0, -2).mean(0))


@every_family
def test_a_low_precision_measures_nearly_the_same(family: str) -> None:
    structure = infer_of(family)
    units = [units_of(structure, s) for s in structure.prunable_sites()]
    before = {n: t.clone() for n, t in structure.analysis.graph_module.state_dict().items()}
    widths = {u.site.name: [1] for u in units}
    exact = harm.measure(structure, IDS.split(2), units, widths, plain)
    rough = harm.measure(structure, IDS.split(2), units, widths, plain, dtype=torch.bfloat16)
    for u in units:
        assert rough[u.site.name][1] == pytest.approx(exact[u.site.name][1], rel=0.25, abs=2e-3)
    assert rough != exact
    for name, tensor in structure.analysis.graph_module.state_dict().items():
        assert tensor.equal(before[name])
        assert tensor.dtype == before[name].dtype


def infer_of(family: str) -> Any:
    return slimgraph.infer(slimgraph.trace(make(family).float()))


def test_cuts_are_decided_from_what_the_low_precision_gives() -> None:
    structure = slimgraph.infer(slimgraph.trace(make("llama").float()))
    units = [units_of(structure, s) for s in structure.prunable_sites()]
    seen: set[torch.dtype] = set()

    def decide(u: Units, evidence: Evidence, keep: int) -> Decision:
        seen.update(x.dtype for x in evidence.inputs)
        return plain(u, evidence, keep)

    harm.measure(structure, [IDS], units, {u.site.name: [1] for u in units}, decide, dtype=torch.bfloat16)
    assert seen == {torch.bfloat16}


def test_float64_is_measured_as_it_is() -> None:
    units = sites_of("llama")
    widths = {u.site.name: [1] for u in units}
    structure = decoder().structure
    exact = harm.measure(structure, [IDS], units, widths, plain)
    assert harm.measure(structure, [IDS], units, widths, plain, dtype=torch.bfloat16) == exact


def test_processes_add_up() -> None:
    """Two processes that hold the same tokens."""
    units = sites_of("llama")
    widths = {u.site.name: [1] for u in units}
    one = harm.measure(decoder().structure, [IDS], units, widths, plain)
    two = harm.measure(decoder().structure, [IDS], units, widths, plain, combine=lambda sums: 2 * sums)
    for name, found in one.items():
        assert two[name] == pytest.approx(found)


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4, dtype=torch.long)]])
def test_no_tokens_are_refused(batches: list[Tensor]) -> None:
    with pytest.raises(CalibrationError, match=r"^no calibration tokens; expected at least one sequence$"):
        harm.measure(decoder().structure, batches, sites_of("llama"), {}, plain)


# -- curves -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(measured=st.dictionaries(st.integers(1, 19), st.floats(0, 10), max_size=5))
def test_a_curve_goes_through_what_was_measured_and_never_falls(measured: dict[int, float]) -> None:
    units = next(u for u in sites_of("llama") if u.site.kind == "channels")
    widths = list(range(min(measured, default=20), 21))
    found = harm.curve(measured, units, widths)
    assert list(found) == widths
    assert found[20] == 0
    values = list(found.values())
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))
    for keep in measured:
        worst = max(v for k, v in measured.items() if k >= keep)
        assert found[keep] == pytest.approx(worst)


def test_a_quadratic_harm_is_found_between_the_measured_widths() -> None:
    units = next(u for u in sites_of("llama") if u.site.kind == "channels")
    found = harm.curve({4: 16.0**2, 10: 10.0**2}, units, range(4, 21))
    assert found == pytest.approx({k: (20.0 - k) ** 2 for k in range(4, 21)})


# -- the budget -------------------------------------------------------------------------------------------------------


def goal_of(family: str = "llama") -> Goal:
    units = sites_of(family)
    structure = decoder(family).structure
    sizes = {n: p.numel() for n, p in structure.analysis.graph_module.named_parameters()}
    return Goal(structure, units, {0: 1.0, 1: 1.0}, sizes, {}, round_to=4)


def removed_by(goal: Goal, keep: dict[str, int]) -> int:
    kept = {u.group: keep[u.site.name] for u in goal.sites}
    return sum(goal.sizes.values()) - parameter_count(goal.structure, kept, goal.sizes)


@st.composite
def convex_curves(draw: st.DrawFn) -> dict[str, dict[int, float]]:
    """Harm at every width a site can have; each step harms more than the one before it."""
    curves = {}
    for u in goal_of().sites:
        widths = list(range(u.block_size, 0, -1 if u.site.kind == "heads" else -4))
        number = len(widths) - 1
        steps = sorted(draw(st.lists(st.floats(0.01, 5), min_size=number, max_size=number, unique=True)))
        curves[u.site.name] = dict(zip(widths, itertools.accumulate([0.0, *steps]), strict=True))
    return curves


@settings(max_examples=40, deadline=None)
@given(curves=convex_curves(), count=st.integers(0, 10))
def test_convex_curves_are_shared_out_at_the_least_harm(curves: dict[str, dict[int, float]], count: int) -> None:
    """At every total that the cheapest steps come to there is no combination that removes as much for less harm."""
    goal = goal_of()
    whole = {u.site.name: u.block_size for u in goal.sites}
    steps = []
    for name, curve in curves.items():
        for wide, narrow in itertools.pairwise(curve):
            saved = removed_by(goal, {**whole, name: narrow}) - removed_by(goal, {**whole, name: wide})
            steps.append(((curve[narrow] - curve[wide]) / saved, saved))
    slopes = sorted(slope for slope, _ in steps)
    assume(all(b > a * (1 + 1e-9) for a, b in itertools.pairwise(slopes)))
    needed = sum(saved for _, saved in sorted(steps)[:count])
    budget = solve_curves(goal, curves, needed / sum(goal.sizes.values()))
    assert removed_by(goal, dict(budget.keep)) == needed == budget.parameters_before - budget.parameters_after
    total = sum(curves[name][keep] for name, keep in budget.keep.items())
    for combination in itertools.product(*curves.values()):
        if removed_by(goal, dict(zip(curves, combination, strict=True))) >= needed:
            assert sum(curves[n][w] for n, w in zip(curves, combination, strict=True)) >= total - 1e-9


@settings(max_examples=60, deadline=None)
@given(curves=convex_curves(), ratio=st.floats(0, 0.3))
def test_a_ratio_between_steps_is_met_to_half_a_step(curves: dict[str, dict[int, float]], ratio: float) -> None:
    goal = goal_of()
    budget = solve_curves(goal, curves, ratio)
    whole = {u.site.name: u.block_size for u in goal.sites}
    steps = [removed_by(goal, {**whole, name: keep}) for name, keep in _first(goal)]
    assert abs(removed_by(goal, dict(budget.keep)) - ratio * budget.parameters_before) <= max(steps) / 2 + 1


def _first(goal: Goal) -> list[tuple[str, int]]:
    return [(u.site.name, u.block_size - (1 if u.site.kind == "heads" else 4)) for u in goal.sites]


def test_a_width_that_a_neighbour_beats_is_stepped_over() -> None:
    goal = goal_of()
    channels = next(u for u in goal.sites if u.site.kind == "channels")
    curves = {u.site.name: {u.block_size: 0.0, u.block_size - 1: 100.0} for u in goal.sites}
    curves[channels.site.name] = {20: 0.0, 12: 5.0, 4: 6.0}
    save = removed_by(goal, {**{u.site.name: u.block_size for u in goal.sites}, channels.site.name: 4})
    budget = solve_curves(goal, curves, save / sum(goal.sizes.values()))
    assert budget.keep == {u.site.name: 4 if u is channels else u.block_size for u in goal.sites}
    # Its cheap second half is not to be had without the dear first one: what harms less than both goes before.
    other = [u for u in goal.sites if u.site.kind == "channels"][1]
    curves[other.site.name] = {20: 0.0, 12: 2.0}
    budget = solve_curves(goal, curves, save / 2 / sum(goal.sizes.values()))
    assert budget.keep == {u.site.name: 12 if u is other else u.block_size for u in goal.sites}


def test_what_frees_nothing_of_the_resource_is_not_cut() -> None:
    """Channels have no part in a cache; a little less of it than was asked for is no reason to cut them."""
    goal = goal_of()
    heads = {u.site.name for u in goal.sites if u.site.kind == "heads"}
    curves = {u.site.name: {u.block_size: 0.0, 1: 1.0} for u in goal.sites}

    def cache(keep: Mapping[str, int]) -> float:
        return sum(keep[name] for name in heads)

    whole = {u.site.name: u.block_size for u in goal.sites}
    most = 1 - len(heads) / cache(whole)
    budget = solve_curves(goal, curves, most * 1.005, cache)
    assert budget.keep == {name: 1 if name in heads else size for name, size in whole.items()}


def test_what_is_said_to_be_reachable_can_be_asked_for() -> None:
    goal = goal_of()
    curves = {u.site.name: {u.block_size: 0.0, u.block_size - 1: 1.0} for u in goal.sites}
    for least in (2 / 3, 0.66667, 0.5, 0.123456):  # of which four digits, rounded, are more than there is
        left = functools.partial(_to_share, {u.site.name: u.block_size for u in goal.sites}, least)
        with pytest.raises(PlanError) as caught:
            solve_curves(goal, curves, 0.9, left)
        named = re.search(r"Ask for at most (\d\.\d+)", str(caught.value))
        assert named is not None
        assert float(named[1]) <= least < float(named[1]) + 1e-4


def _to_share(whole: Mapping[str, int], share: float, keep: Mapping[str, int]) -> float:
    """What is left of 1 where every unit that goes takes as much as any other, and all of them this share."""
    return 1 - share * sum(whole[name] - keep[name] for name in whole) / len(whole)


def test_more_than_the_curves_go_down_to_cannot_be_reached() -> None:
    goal = goal_of()
    curves = {u.site.name: {u.block_size: 0.0, u.block_size - 1: 1.0} for u in goal.sites}
    with pytest.raises(PlanError, match=r"^ratio 0\.9 cannot be reached") as caught:
        solve_curves(goal, curves, 0.9)
    most = removed_by(goal, {u.site.name: u.block_size - 1 for u in goal.sites}) / sum(goal.sizes.values())
    assert f"{most:.4f}" in str(caught.value)


@pytest.mark.parametrize("of", ["parameters", "macs"])
def test_what_cannot_be_reached_is_refused_before_a_cut_is_tried(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class TriedError(Exception): ...

    def tried(*_: Any, **__: Any) -> None:
        raise TriedError

    def prune(ratio: float) -> None:
        allocation = HarmAllocation(ratio=ratio, of=of)
        slimgraph.prune(decoder().model, IDS, recipe=Recipe((Magnitude(), NoRecovery(), allocation, Sweep())))

    monkeypatch.setattr(harm, "measure", tried)
    with pytest.raises(PlanError, match=r"^ratio 0\.9 cannot be reached: .* narrower `widths`") as caught:
        prune(0.9)
    (most,) = re.findall(r"Ask for at most (0\.\d+)", str(caught.value))
    with pytest.raises(TriedError):
        prune(float(most))


@pytest.mark.parametrize("kinds", ["both", "heads", "channels"])
def test_the_spared_layers_do_not_depend_on_what_is_cut(kinds: str) -> None:
    structure = decoder(num_hidden_layers=4).structure
    assert HarmAllocation(ratio=0.1, kinds=kinds, spare_last_heads=0.25)._spared(structure) == {3}


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(PlanError, match=r"expected a share of all parameters, 0 <= ratio < 1$"):
        solve_curves(goal_of(), {}, ratio)


# -- the whole method -------------------------------------------------------------------------------------------------

FINE: dict[str, dict[str, Any]] = {  # a step of one site is a small part of the model
    "llama": {"num_hidden_layers": 4, "intermediate_size": 96},
    "gpt2": {"n_layer": 4, "n_inner": 96, "n_head": 12},
    "gpt_neox": {"num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 12, "rotary_pct": 1.0},
    "gemma3": {"num_hidden_layers": 4, "intermediate_size": 96},
}


@every_family
def test_the_method_removes_what_was_asked_for(family: str) -> None:
    model = make(family, **FINE[family]).float()
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = slimgraph.prune(model, IDS, 0.2, recipe="slimgraph", verify=True, round_to=1)
    assert result.model is not None
    assert 1 - result.parameters_after / result.parameters_before == pytest.approx(0.2, abs=0.01)
    assert sum(p.numel() for p in result.model.parameters()) == result.parameters_after
    assert result.difference == pytest.approx(0, abs=1e-4)
    assert result.budget is not None
    assert result.budget.parameters_after == result.parameters_after
    assert len(set(result.budget.unit_ratios.values())) > 1
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    assert logits(result.model, IDS).isfinite().all()


def test_what_harms_less_is_cut_more() -> None:
    """Channels of one layer write almost nothing: they go first."""
    model = make(num_hidden_layers=3, intermediate_size=96)
    with torch.no_grad():
        tensor_at(model, "model.layers.1.mlp.down_proj.weight").mul_(1e-3)
    result = slimgraph.prune(model, IDS, 0.2, recipe="slimgraph", round_to=1)
    assert result.budget is not None
    channels = [keep for name, keep in result.budget.keep.items() if "down_proj" in name]
    assert channels[1] < min(channels[0], channels[2]) / 2


def test_the_recipe_survives_yaml() -> None:
    recipe = method("slimgraph", 0.2)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    changed = Recipe(
        (
            Pearson(),
            FeatureSpace(),
            LeastSquares(target="dense", prior=7.0),
            HarmAllocation(ratio=0.1, widths=(0.5,), tokens=9, dtype=None),
        )
    )
    again = Recipe.from_yaml(changed.to_yaml())
    assert again == changed
    assert isinstance(again.passes[3], HarmAllocation)
    assert again.passes[3].widths == (0.5,)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 0.2, "widths": ()}, "widths are (); expected shares between 0 and 1"),
    ({"ratio": 0.2, "widths": (0.5, 1.0)}, "widths are (0.5, 1.0); expected shares between 0 and 1"),
    ({"ratio": 0.2, "widths": (0.0,)}, "widths are (0.0,); expected shares between 0 and 1"),
    ({"unit_ratio": 0.2}, "unit_ratio is 0.2; expected ratio, of all parameters"),
    ({}, "give either ratio or unit_ratio; found None and None"),
    ({"ratio": 0.2, "tokens": 0}, "tokens is 0; expected at least 1"),
    ({"ratio": 0.2, "samples": 0}, "samples is 0; expected at least 1, or null"),
    ({"ratio": 0.2, "spare_last_heads": 1.0}, "spare_last_heads is 1.0; expected a share of the layers, below 1"),
    ({"ratio": 0.2, "power": 0.5}, "power is 0.5; expected at least 1, and finite"),
    ({"ratio": 0.2, "power": math.inf}, "power is inf; expected at least 1, and finite"),
    ({"ratio": 0.2, "dtype": "int8"}, "dtype is 'int8'; expected bfloat16 or null"),
    ({"ratio": 0.2, "round_to": 0}, "round_to is 0; expected at least 1"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_cannot_be_allocated_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{re.escape(f'harm_allocation: {message}')}$"):
        HarmAllocation(**fields)


@pytest.mark.parametrize(("share", "whole"), [(0.0, 0), (0.12, 0), (0.13, 1), (0.25, 1), (0.5, 2)])
def test_the_last_heads_stay(share: float, whole: int) -> None:
    """All else is cut as far as it was tried, so that nothing but the field keeps heads."""
    graph = attach(own_graph(decoder(num_hidden_layers=4)), State(batches=IDS.split(3)))
    allocation = HarmAllocation(ratio=0.1, round_to=1, spare_last_heads=share)
    for step in (Magnitude(), NoRecovery()):
        step(graph)
    with pytest.raises(PlanError) as refused:
        replace(allocation, ratio=0.99)(graph)
    most = re.search(r"Ask for at most ([0-9.]+)", str(refused.value))
    assert most is not None
    replace(allocation, ratio=float(most[1]))(graph)
    state = graph.meta[KEY]
    cut = {(u.site.kind, u.site.layer) for u in state.units if state.budget.keep[u.site.name] < u.block_size}
    assert cut == {("channels", i) for i in range(4)} | {("heads", i) for i in range(4 - whole)}


@pytest.mark.parametrize(("samples", "expected"), [(1, 2), (2, 2), (3, 4), (60, 6), (None, 6)])
def test_cuts_are_decided_from_whole_micro_batches(samples: int | None, expected: int) -> None:
    seen: list[int] = []

    class Counting(Magnitude):
        def select(self, evidence: Evidence, keep: int) -> Tensor:
            seen.append(evidence.count)
            return super().select(evidence, keep)

    graph = attach(own_graph(decoder()), State(batches=IDS.split(2)))
    for step in (Counting(), NoRecovery(), HarmAllocation(ratio=0.1, round_to=1, samples=samples)):
        step(graph)
    assert set(seen) == {expected * IDS.shape[1]}


def test_every_field_of_the_allocation_reaches_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measured(structure: Any, batches: Any, units: Any, widths: Any, decide: Any, **options: Any) -> harm.Library:
        seen.update(options, widths=widths)
        return {u.site.name: {widths[u.site.name][0]: 1.0} for u in units}

    monkeypatch.setattr(harm, "measure", measured)
    monkeypatch.setattr(base, "faster_in", lambda *_: True)
    graph = attach(own_graph(decoder()), State(batches=[IDS]))
    fields: dict[str, Any] = {"tokens": 7, "power": 2.5, "together": False, "widths": (0.3, 0.6)}
    for step in (Magnitude(), NoRecovery(), HarmAllocation(ratio=0.1, round_to=1, spare_last_heads=0.0, **fields)):
        step(graph)
    assert {name: seen[name] for name in ("tokens", "power", "together", "dtype")} == {
        "tokens": 7,
        "power": 2.5,
        "together": False,
        "dtype": torch.bfloat16,
    }
    tried = {u.site.kind: seen["widths"][u.site.name] for u in graph.meta[KEY].units}
    assert tried == {"heads": [1], "channels": [6, 12]}  # blocks of 2 heads, at least one of which stays; 20 channels


MISSING: list[tuple[list[Pass], dict[str, Any], type[Exception], str]] = [
    ([], {}, PlanError, "harm_allocation lacks a fit: put importance and recovery passes before it"),
    ([Magnitude()], {}, PlanError, "harm_allocation lacks a fit: put importance and recovery passes before it"),
    (
        [NoRecovery(), FeatureSpace()],
        {},
        PlanError,
        "harm_allocation lacks how to choose heads: put importance and recovery passes before it",
    ),
    ([], {"batches": []}, CalibrationError, "harm_allocation needs calibration tokens; found none in the state"),
    (
        [Magnitude(), NoRecovery()],
        {"weights": lambda name: None},
        PlanError,
        "harm_allocation runs the model many times, and for that it has to be in memory; found weights that are "
        "fetched as needed: load the model whole, or take cosine_allocation",
    ),
]


@pytest.mark.parametrize("of", ["parameters", "macs", "latency"])
@pytest.mark.parametrize(("before", "state", "error", "message"), MISSING)
def test_an_allocation_says_what_is_missing(
    before: list[Pass], state: dict[str, Any], error: type[Exception], message: str, of: str
) -> None:
    graph = attach(own_graph(decoder()), State(**{"batches": IDS.split(3), **state}))
    for step in before:
        step(graph)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        HarmAllocation(ratio=0.1, round_to=1, of=of)(graph)


def test_the_own_method_ends_in_a_checkpoint_like_any_other(tmp_path: Any) -> None:
    dense = make("llama")
    result = slimgraph.prune(dense, IDS, 0.1, recipe="slimgraph", round_to=1)
    assert Recipe.from_dict(result.manifest().recipe) == method("slimgraph", 0.1, round_to=1)
    result.save(tmp_path / "small")
    result.save(tmp_path / "small", force=True)  # as often as one likes
    again = type(dense).from_pretrained(tmp_path / "small", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(again, IDS), logits(result.model, IDS), rtol=0, atol=0)
