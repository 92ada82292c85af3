"""FLAP and LLM-Pruner's Taylor score against their definitions, and the allocations that go with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import Toy, decoder, make, own_graph, tokens
from reference import random_site
from torch import Tensor, fx, nn
from torch.nn import functional

import slimgraph
from slimgraph.budget import Goal, solve_ranked
from slimgraph.errors import CalibrationError, ModelError, NumericsError, PlanError, RecipeError
from slimgraph.groups import infer
from slimgraph.passes import (
    Fluctuation,
    FluctuationAllocation,
    NoRecovery,
    Sweep,
    Taylor,
    UniformAllocation,
)
from slimgraph.passes.fluctuation import standardised
from slimgraph.pipeline import run_passes
from slimgraph.recipe import Recipe, method
from slimgraph.state import State, attach
from slimgraph.trace import trace
from slimgraph.units import parameter_count, units_of

IDS = tokens(6, 9, seed=3)


def state_on(graph: fx.GraphModule, **fields: Any) -> State:
    state = State(**{"batches": IDS.split(3), **fields})
    attach(graph, state)
    return state


# -- FLAP -------------------------------------------------------------------------------------------------------------


def test_fluctuation_is_variance_times_squared_norm_of_the_column() -> None:
    site = random_site(seed=1)
    expected = []
    for unit in site.all_units:
        own = (site.units == unit).nonzero().flatten().tolist()
        terms = [float(site.x[:, j].double().var(correction=0) * (site.weight[:, j].double() ** 2).sum()) for j in own]
        expected.append(sum(terms) / len(terms))
    assert Fluctuation().scores(site.evidence()).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_constant_channel_goes_first_however_large_it_is() -> None:
    site = random_site(seed=1)
    loud = site.units == 0
    x = torch.where(loud, 1e3, site.x)
    scores = Fluctuation().scores(type(site)(x, site.weight, site.bias, site.units, site.blocks).evidence())
    assert int(scores.argmin()) == 0


def test_fluctuation_of_infinite_weights_is_refused() -> None:
    site = random_site(seed=1)
    weight = site.weight.clone()
    weight[0, 0] = torch.inf
    broken = type(site)(site.x, weight, site.bias, site.units, site.blocks)
    with pytest.raises(NumericsError, match="not finite"):
        Fluctuation().scores(broken.evidence())


def ranked_goal(heads: str = "kv", **config: int) -> tuple[Goal, State]:
    graph = own_graph(decoder(**config))
    state = state_on(graph)
    structure = infer(graph)
    state.units = [units_of(structure, s, heads) for s in structure.prunable_sites()]
    weights = {u.site.layer: 1.0 for u in state.units if u.site.layer is not None}
    return Goal(structure, state.units, weights, state.sizes, {}, round_to=1), state


def test_standardised_scores_have_mean_0_over_a_sites_channels() -> None:
    goal, state = ranked_goal()
    found = standardised(goal.structure, state)
    assert found.keys() == {u.site.name for u in goal.sites}
    for u in goal.sites:
        assert float(found[u.site.name].mean()) == pytest.approx(0, abs=1e-9)  # units of a site are equally large
        if u.site.kind == "channels":
            assert float(found[u.site.name].std()) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_one_threshold_divides_what_stays_from_what_goes(ratio: float) -> None:
    goal, state = ranked_goal()
    scores = standardised(goal.structure, state)
    budget = solve_ranked(goal, scores, ratio)
    assert budget.removed == pytest.approx(ratio, abs=0.03)
    kept, gone = [], []
    for u in goal.sites:
        ranked = scores[u.site.name].sort(descending=True).values
        stay = budget.keep[u.site.name]
        kept.append(float(ranked[stay - 1]) if stay > 1 else torch.inf)  # the last of a site has to stay anyway
        gone.append(float(ranked[stay]) if stay < len(ranked) else -torch.inf)
    # Made up site by site at the end, so that units between two neighbouring thresholds may go either way.
    assert sum(k < max(gone) for k in kept) <= 1
    assert len(set(budget.keep.values())) > 2  # sites do not all lose alike


def test_blocks_of_a_site_keep_the_mean_over_them() -> None:
    """By these scores one of three blocks of heads would lose all, and the others nothing."""
    goal, _ = ranked_goal("balanced", num_attention_heads=12)
    scores = {u.site.name: torch.ones(len(u.blocks), dtype=torch.float64) for u in goal.sites}
    heads = [u for u in goal.sites if u.site.kind == "heads"]
    for u in heads:
        assert (u.block_count, u.block_size) == (3, 4)
        scores[u.site.name][u.blocks == 1] = 0.0
    gone = {u.site.name: 3 if u in heads else u.block_size for u in goal.sites}
    left = parameter_count(goal.structure, {u.group: gone[u.site.name] for u in heads}, goal.sizes)
    assert solve_ranked(goal, scores, 1 - left / sum(goal.sizes.values())).keep == gone


def test_a_ranking_cannot_do_what_no_cut_can() -> None:
    goal, state = ranked_goal()
    scores = standardised(goal.structure, state)
    with pytest.raises(PlanError, match="cannot be reached"):
        solve_ranked(goal, scores, 0.95)
    with pytest.raises(PlanError, match="0 <= ratio < 1"):
        solve_ranked(goal, scores, 1.0)
    assert solve_ranked(goal, scores, 0.0).removed == pytest.approx(0, abs=0.03)


def test_flap_needs_a_ratio_and_tokens() -> None:
    with pytest.raises(RecipeError, match="unit_ratio"):
        FluctuationAllocation(unit_ratio=0.2)
    graph = own_graph(decoder())
    state_on(graph, batches=[])
    with pytest.raises(CalibrationError, match="found none"):
        run_passes(graph, [Fluctuation(), NoRecovery(), FluctuationAllocation(ratio=0.2), Sweep()])


# -- Taylor -----------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Tensor]:
    """|w · g| of the mean next-token loss, by transformers and autograd alone."""
    logits = model(IDS).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    return {name: (p * g).abs().detach() for (name, p), g in zip(named.items(), found, strict=True)}


def scores_of(graph: fx.GraphModule, taylor: Taylor) -> dict[str, Tensor]:
    state = state_on(graph)
    run_passes(graph, [taylor, NoRecovery(), UniformAllocation(ratio=0.2, heads="kv", round_to=1)])
    found: dict[str, Tensor] = {}
    for kind, chooser in state.importance.items():
        for u in (u for u in state.units if u.site.kind == kind):
            found[u.site.name] = chooser.scores(SimpleNamespace(name=u.site.name))  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_taylor_sums_rows_and_columns(family: str) -> None:
    model = make(family)
    worth = gradients(model)
    found = scores_of(trace(model), Taylor())
    if family == "llama":
        for layer in range(2):
            mlp, attention = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.self_attn."
            channels = worth[mlp + "down_proj.weight"].sum(0)
            channels = channels + worth[mlp + "gate_proj.weight"].sum(1) + worth[mlp + "up_proj.weight"].sum(1)
            assert found[mlp + "down_proj.weight[1]"].tolist() == pytest.approx(channels.tolist(), rel=1e-6)
            heads = worth[attention + "o_proj.weight"].sum(0).view(3, -1).sum(1)
            for name in ("q_proj", "k_proj", "v_proj"):
                heads = heads + worth[attention + f"{name}.weight"].sum(1).view(3, -1).sum(1)
            assert found[attention + "o_proj.weight[1]"].tolist() == pytest.approx(heads.tolist(), rel=1e-6)
    elif family == "gpt2":  # stored the other way round, with queries, keys and values in one
        block = "transformer.h.1."
        channels = worth[block + "mlp.c_proj.weight"].sum(1) + worth[block + "mlp.c_fc.weight"].sum(0)
        assert found[block + "mlp.c_proj.weight[0]"].tolist() == pytest.approx(channels.tolist(), rel=1e-6)
        fused = worth[block + "attn.c_attn.weight"].sum(0).view(3, 4, -1).sum((0, 2))
        heads = worth[block + "attn.c_proj.weight"].sum(1).view(4, -1).sum(1) + fused
        assert found[block + "attn.c_proj.weight[0]"].tolist() == pytest.approx(heads.tolist(), rel=1e-6)
    else:  # gate and up in one
        mlp = "model.layers.0.mlp."
        both = worth[mlp + "gate_up_proj.weight"].sum(1).view(2, -1).sum(0)
        channels = worth[mlp + "down_proj.weight"].sum(0) + both
        assert found[mlp + "down_proj.weight[1]"].tolist() == pytest.approx(channels.tolist(), rel=1e-6)


def test_taylor_does_not_depend_on_the_batch_and_leaves_the_model_alone() -> None:
    model = make()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    graph = trace(model)
    one, several = scores_of(graph, Taylor(batch=1)), scores_of(graph, Taylor(batch=3))
    for name, scores in one.items():
        assert scores.tolist() == pytest.approx(several[name].tolist(), rel=1e-9)
        assert float(scores.min()) > 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_taylor_refuses_what_it_cannot_do() -> None:
    graph = own_graph(decoder())
    state_on(graph, batches=[])
    with pytest.raises(CalibrationError, match="found none"):
        run_passes(graph, [Taylor()])
    state_on(graph, weights=lambda name: torch.zeros(1))
    with pytest.raises(ModelError, match="whole model in memory"):
        run_passes(graph, [Taylor()])


def test_taylor_says_that_nothing_can_be_cut() -> None:
    graph = trace(Toy(nn.Linear(8, 8)))
    state_on(graph)
    with pytest.raises(PlanError, match="no site can be pruned in this graph"):
        run_passes(graph, [Taylor()])


@pytest.mark.parametrize(("wrong", "message"), [(0, "batch is 0"), (-2, "batch is -2")])
def test_taylor_takes_samples_one_by_one_at_least(wrong: int, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^taylor: {message}; expected at least 1$"):
        Taylor(batch=wrong)


def test_taylor_needs_something_to_predict() -> None:
    graph = own_graph(decoder())
    state_on(graph, batches=[IDS[:, :1]])
    with pytest.raises(CalibrationError, match="samples of 1 token each"):
        run_passes(graph, [Taylor()])


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flap", "taylor"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_methods_prune_to_the_ratio(name: str, family: str) -> None:
    model = make(family)
    result = slimgraph.prune(model, IDS, ratio=0.15, recipe=name, round_to=1)
    assert 1 - result.parameters_after / result.parameters_before == pytest.approx(0.15, abs=0.06)
    assert result.model is not None
    recipe = method(name, 0.15)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_layers_at_both_ends_are_spared() -> None:
    recipe = Recipe((Fluctuation(), NoRecovery(), UniformAllocation(ratio=0.05, spare_first=0.5, round_to=1), Sweep()))
    result = slimgraph.prune(make(), IDS, recipe=recipe)
    assert result.plan.cuts
    assert all("layers.1." in name for name in result.plan.cuts)
    for wrong in ({"spare_first": 0.5, "spare_last": 0.5}, {"spare_last": -0.1}):
        with pytest.raises(RecipeError, match="together below 1"):
            UniformAllocation(ratio=0.1, **wrong)
