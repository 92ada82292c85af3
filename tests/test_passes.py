"""Passes: what each records, that they run beside passes of others, and what they say when something is missing."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import FeedForward, Toy, decoder, logits, make, own_graph, tokens
from reference import random_site
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import slimgraph.passes
from slimgraph import recover, score
from slimgraph.debug.report import layers_of
from slimgraph.errors import CalibrationError, GraphError, NumericsError, PlanError, RecipeError
from slimgraph.groups import infer
from slimgraph.masked import masked_logits
from slimgraph.passes import (
    ApplyPlan,
    BiasOnly,
    CosineAllocation,
    Elimination,
    FeatureSpace,
    LeastSquares,
    Magnitude,
    NoRecovery,
    Pass,
    Pearson,
    RandomImportance,
    Regression,
    Sweep,
    UniformAllocation,
    Verify,
    WandaSp,
    pass_named,
    pass_names,
    register,
)
from slimgraph.passes import allocation as allocation_passes
from slimgraph.pipeline import run_passes
from slimgraph.plan import Cut, Plan, resolve
from slimgraph.recipe import METHODS, Recipe, method
from slimgraph.rules import operator_name
from slimgraph.state import State, attach, state_of
from slimgraph.surgery import assign
from slimgraph.trace import trace
from slimgraph.units import units_of

IDS = tokens(6, 9, seed=3)
DOWN = "model.layers.0.mlp.down_proj.weight[1]"
aten = torch.ops.aten


def own_passes() -> list[type[Pass]]:
    """Passes of the package; doctests and other tests may have registered more."""
    found = [pass_named(name) for name in pass_names()]
    return [c for c in found if c.__module__.startswith("slimgraph.passes.") and "base" not in c.__module__]


def dense(**state: Any) -> fx.GraphModule:
    """A graph of its own for one test, with a state."""
    return attach(own_graph(decoder()), State(**{"batches": IDS.split(3), **state}))


# -- what a pass is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", own_passes(), ids=lambda c: c.name)
def test_a_pass_is_a_frozen_dataclass_that_is_exported_and_documented(cls: type[Pass]) -> None:
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert cls.__name__ in slimgraph.passes.__all__
    assert getattr(slimgraph.passes, cls.__name__) is cls
    assert re.sub(r"(?<!^)([A-Z])", r"_\1", cls.__name__).lower() == cls.name
    described = "\n".join(inspect.getdoc(c) or "" for c in cls.__mro__ if "__doc__" in vars(c))
    assert len((cls.__doc__ or "").splitlines()[0]) > 20
    for field in dataclasses.fields(cls):
        assert re.search(rf"^ +{field.name}: ", described, re.MULTILINE), field.name


@pytest.mark.parametrize("cls", own_passes(), ids=lambda c: c.name)
def test_a_pass_on_a_graph_without_a_state_says_what_to_do(cls: type[Pass]) -> None:
    fields = {"plan": {}} if cls is ApplyPlan else {"ratio": 0.1} if cls.name.endswith("_allocation") else {}
    with pytest.raises(PlanError, match=r"carries no Slimgraph state: call slimgraph\.state\.attach"):
        cls(**fields)(decoder().graph)


def test_only_passes_that_change_the_graph_say_so() -> None:
    graph = dense()
    for step in (Pearson(), FeatureSpace(), Regression(), UniformAllocation(ratio=0.2, round_to=1), Verify()):
        result = step(graph)
        assert isinstance(result, PassResult)
        assert not result.modified
        assert result.graph_module is graph
    before = str(graph.graph)
    result = Sweep()(graph)
    assert result.modified
    assert result.graph_module is not graph
    assert str(graph.graph) == before
    assert state_of(result.graph_module) is state_of(graph)


def test_the_state_remembers_what_ran() -> None:
    recipe = method("slimllm", 0.2, round_to=1)
    graph = dense()
    run_passes(graph, recipe.passes)
    assert state_of(graph).history == recipe.to_dict()["passes"]


def test_the_state_counts_parameters_unless_told() -> None:
    assert state_of(dense()).sizes == {n: p.numel() for n, p in decoder().graph.named_parameters()}
    assert state_of(dense(sizes={"w": 3})).sizes == {"w": 3}


# -- importance and recovery ------------------------------------------------------------------------------------------

KINDS = [
    (Pearson(), {"heads"}),
    (FeatureSpace(), {"channels"}),
    (Magnitude(), {"heads", "channels"}),
    (WandaSp(), {"heads", "channels"}),
    (RandomImportance(), {"heads", "channels"}),
    (Elimination(), {"heads", "channels"}),
]


@pytest.mark.parametrize(("step", "kinds"), KINDS, ids=[s.name for s, _ in KINDS])
def test_an_importance_pass_is_recorded_for_its_kinds(step: Pass, kinds: set[str]) -> None:
    graph = dense(importance={"heads": None, "channels": None})
    step(graph)
    assert {k for k, chosen in state_of(graph).importance.items() if chosen is step} == kinds


SELECTIONS: list[tuple[Any, Callable[[Any], Tensor]]] = [
    (Magnitude(), score.magnitude),
    (WandaSp(), score.wanda),
    (FeatureSpace(), score.feature_space),
    (FeatureSpace(directions=False), lambda e: score.feature_space(e, directions=False)),
    (FeatureSpace(sources=False), lambda e: score.feature_space(e, sources=False)),
    (FeatureSpace(activations=False), lambda e: score.feature_space(e, activations=False)),
]


@pytest.mark.parametrize(("step", "scores"), SELECTIONS, ids=[repr(s) for s, _ in SELECTIONS])
def test_an_importance_pass_keeps_the_best_of_each_block(step: Any, scores: Callable[[Any], Tensor]) -> None:
    different = set()
    for seed in range(8):
        evidence = random_site(seed, blocks=2, block_size=4).evidence()
        expected = scores(evidence)
        found = step.select(evidence, 2)
        for block in range(2):
            members = (evidence.blocks == block).nonzero().flatten()
            best = members[expected[members].argsort(descending=True)[:2]]
            assert sorted(best.tolist()) == [u for u in found.tolist() if evidence.blocks[u] == block]
        different.add(tuple(found.tolist()))
    assert len(different) > 1


@pytest.mark.parametrize("search", [True, False])
def test_pearson_searches_when_asked(search: bool) -> None:
    for seed in range(5):
        evidence = random_site(seed).evidence()
        assert Pearson(search=search).select(evidence, 1).equal(score.pearson_select(evidence, 1, search=search))


def test_a_share_of_the_lowest_can_stay() -> None:
    evidence = random_site(1, blocks=1, block_size=20, width=1).evidence()
    order = score.feature_space(evidence).argsort().tolist()
    kept = FeatureSpace(keep_lowest=0.1).select(evidence, 10).tolist()
    assert sorted(order[:2] + order[-8:]) == kept


def test_random_units_depend_on_seed_and_site_only() -> None:
    one, same, other = (random_site(s, blocks=1, block_size=12).evidence(n) for s, n in [(0, "a"), (1, "a"), (0, "b")])
    chosen = RandomImportance(seed=3).select(one, 6).tolist()
    assert RandomImportance(seed=3).select(same, 6).tolist() == chosen
    assert RandomImportance(seed=3).select(other, 6).tolist() != chosen
    assert RandomImportance(seed=4).select(one, 6).tolist() != chosen
    ahead, behind = (random_site(0, blocks=1, block_size=12).evidence(n) for n in ("layers.12", "layers.21"))
    assert RandomImportance().select(ahead, 6).tolist() != RandomImportance().select(behind, 6).tolist()


RECOVERIES = [
    (Regression(), recover.regression, True),
    (LeastSquares(target="local"), recover.least_squares, True),
    (BiasOnly(), recover.bias_only, True),
    (NoRecovery(), recover.none, False),
]


@pytest.mark.parametrize(("step", "fit", "adds"), RECOVERIES, ids=[s.name for s, *_ in RECOVERIES])
def test_a_recovery_pass_is_recorded_with_its_fit(step: Any, fit: Callable[..., Any], adds: bool) -> None:
    graph = dense()
    step(graph)
    assert state_of(graph).fit_adds_bias is adds
    site = random_site(0, bias=False)
    channels = torch.tensor([0, 3, 5])
    found = state_of(graph).fit(site.evidence(), channels)
    for a, b in zip(found, fit(site.evidence(), channels), strict=True):
        assert (a is None and b is None) or a.equal(b)
    assert (found[1] is not None) == adds


# -- allocation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "cut"), [("heads", {"heads"}), ("channels", {"channels"}), ("both", {"heads", "channels"})]
)
def test_only_the_asked_for_kinds_are_cut(kinds: str, cut: set[str]) -> None:
    graph = dense()
    recipe = [Magnitude(), NoRecovery(), UniformAllocation(unit_ratio=0.5, round_to=1, kinds=kinds), Sweep()]
    run_passes(graph, recipe)
    names = {s.name: s.kind for s in decoder().structure.sites}
    assert {names[n] for n in state_of(graph).refits} == cut
    assert {u.site.kind for u in state_of(graph).units} == cut


def test_biases_that_recovery_adds_are_in_the_budget() -> None:
    for recovery, sign in ((NoRecovery(), 0), (BiasOnly(), 1)):
        graph = dense()
        pruned = run_passes(graph, [Magnitude(), recovery, UniformAllocation(unit_ratio=0.5, round_to=1), Sweep()])
        budget = state_of(graph).budget
        assert budget is not None
        assert sum(p.numel() for p in pruned.parameters()) == budget.parameters_after
        added = {n for n, _ in pruned.named_parameters()} - {n for n, _ in graph.named_parameters()}
        assert len(added) == 4 * sign


@pytest.mark.parametrize("cls", [UniformAllocation, CosineAllocation])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit_ratio": 20.0}, "unit_ratio is 20; expected a share, 0 <= unit_ratio < 1"),
        ({"unit_ratio": -0.5}, "unit_ratio is -0.5; expected a share, 0 <= unit_ratio < 1"),
        ({"unit_ratio": math.nan}, "unit_ratio is nan; expected a share, 0 <= unit_ratio < 1"),
        ({"ratio": 1.0}, "ratio is 1; expected a share, 0 <= ratio < 1"),
        ({"ratio": 0.1, "heads": "some"}, "heads is 'some'; expected one of auto, kv, balanced"),
    ],
)
def test_an_allocation_refuses_what_is_no_share(cls: type[Pass], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"{re.escape(message)}$"):
        cls(**fields)


def test_other_fields_that_cannot_be_meant() -> None:
    with pytest.raises(RecipeError, match="alpha is inf"):
        CosineAllocation(ratio=0.1, alpha=math.inf)
    with pytest.raises(RecipeError, match="keep_lowest is 7"):
        FeatureSpace(keep_lowest=7)
    spared = UniformAllocation(ratio=0.1, spare_first=0.45, spare_last=0.45)
    with pytest.raises(PlanError, match=r"come to 1 and 1 of 2 layers; .*: spare fewer$"):
        spared(dense())


def test_a_budget_is_carried_out_before_the_next() -> None:
    heads, channels = (UniformAllocation(unit_ratio=0.5, round_to=1, kinds=kind) for kind in ("heads", "channels"))
    message = "uniform_allocation: no sweep has carried out yet what uniform_allocation shared out"
    with pytest.raises(PlanError, match=message):
        run_passes(dense(), [Magnitude(), NoRecovery(), heads, channels, Sweep()])
    graph = dense()
    both = run_passes(graph, [Magnitude(), NoRecovery(), heads, Sweep(), channels, Sweep()])
    assert {u.site.kind for u in state_of(both).units} == {"channels"}
    assert len(state_of(both).plan.cuts) == 4


def test_a_recipe_can_go_in_rounds() -> None:
    """The second is of what the first leaves; plan, module and masked equivalence are of the dense model."""
    model, share = decoder().model, UniformAllocation(ratio=0.1, round_to=1)
    fitted = (Pearson(), FeatureSpace(), LeastSquares())
    once = slimgraph.prune(model, IDS, recipe=Recipe((*fitted, share, Sweep())))
    result = slimgraph.prune(
        model, IDS, recipe=Recipe((*fitted, share, Sweep(), share, Sweep())), verify=True, keep_scores=True
    )
    assert result.module_failure is None
    assert result.parameters_after < once.parameters_after < result.parameters_before
    assert result.plan.cuts[DOWN].units == 20
    assert result.plan.cuts[DOWN].kept == result.graph.get_parameter(DOWN.removesuffix("[1]")).shape[1]
    first = layers_of(result)[0]
    assert first.heads is not None
    assert first.channels == (20, result.plan.cuts[DOWN].kept)
    assert first.unit_ratio == pytest.approx(1 - (first.heads[1] / first.heads[0] + first.channels[1] / 20) / 2)
    for name, cut in once.plan.cuts.items():
        for before, after in zip(cut.keep, result.plan.cuts[name].keep, strict=True):
            assert set(after) <= set(before)
    assert {len(scores) for scores in (result.scores or {}).values()} == {20}  # of all units, those of channels


@pytest.mark.parametrize("name", METHODS)
def test_any_method_can_go_in_rounds(name: str) -> None:
    """All that is measured is measured anew; what cannot be is refused."""
    *first, allocation, sweep, verified = method(name, 0.1, round_to=1).passes
    if name == "slimgraph":  # the model writes once, before it is cut
        first[0] = dataclasses.replace(first[0], samples=6)
    again = [allocation, sweep, verified]
    if name == "taylor":
        with pytest.raises(PlanError, match=r"^the gradients of taylor are of a model that was cut since; .* again"):
            slimgraph.prune(decoder().model, IDS, recipe=Recipe((*first, allocation, sweep, *again)))
        again = [*first, *again]
    result = slimgraph.prune(decoder().model, IDS, recipe=Recipe((*first, allocation, sweep, *again)), verify=True)
    assert result.module_failure is None
    assert result.budget is not None
    assert result.parameters_after < result.budget.parameters_before < result.parameters_before


def test_biases_are_known_before_units_are_shared_out() -> None:
    with pytest.raises(PlanError, match=r"^bias_only: uniform_allocation .*: put bias_only before it"):
        run_passes(dense(), [Magnitude(), UniformAllocation(ratio=0.1), BiasOnly(), Sweep()])


def test_a_budget_that_somebody_elses_pass_shares_out_has_to_be_carried_out() -> None:
    """What such a pass leaves is known only when it has run."""

    class Mine(UniformAllocation):
        gives = None

    recipe = Recipe((Magnitude(), NoRecovery(), Mine(ratio=0.1)))
    with pytest.raises(PlanError, match=r"^uniform_allocation has shared out a budget, which nothing has carried out"):
        slimgraph.prune(decoder().model, IDS, recipe=recipe)


@pytest.mark.parametrize(
    ("ids", "batch", "message"),
    [
        (IDS.float(), None, "calibration tokens are torch.float32; expected integers, the ids of tokens"),
        (IDS > 5, None, "calibration tokens are torch.bool; expected integers, the ids of tokens"),
        (IDS, 0, "batch is 0; expected at least 1 sample at once"),
        (IDS, -2, "batch is -2; expected at least 1 sample at once"),
    ],
)
def test_tokens_are_integers_that_go_through_one_by_one_at_least(ids: Tensor, batch: int | None, message: str) -> None:
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)}$"):
        slimgraph.prune(decoder().model, ids, 0.1, recipe="random", batch=batch)


def test_narrow_integers_are_tokens_as_well() -> None:
    one, other = (slimgraph.prune(decoder().model, i, 0.1, recipe="taylor", round_to=1) for i in (IDS, IDS.int()))
    assert one.plan == other.plan


def test_an_endless_prior_is_kept_with_the_model() -> None:
    recipe = Recipe((Magnitude(), LeastSquares(prior=math.inf), UniformAllocation(ratio=0.1, round_to=1), Sweep()))
    kept = slimgraph.prune(decoder().model, IDS, recipe=recipe).manifest().recipe
    assert Recipe.from_dict(json.loads(json.dumps(kept, allow_nan=False))) == recipe


def weights_of(
    step: CosineAllocation, similarity: Sequence[float], monkeypatch: pytest.MonkeyPatch
) -> dict[int, float]:
    """The weights of layers with these similarities, whatever model they are of."""
    monkeypatch.setattr(allocation_passes, "layer_similarity", lambda *_, **__: list(similarity))
    sites = [SimpleNamespace(site=SimpleNamespace(layer=i)) for i in range(len(similarity))]
    state = State(batches=[IDS], units=sites)  # type: ignore[arg-type]
    structure: Any = SimpleNamespace(layers=[f"layers.{i}" for i in range(len(similarity))])
    return dict(step.weights(structure, state))


SIMILARITY = [0.5 + 0.49 * math.sin(3 * i) for i in range(32)]

PUBLISHED = [
    (CosineAllocation(ratio=0.2), 26, 10.0),
    (CosineAllocation(ratio=0.5), 30, 7.0),
    (CosineAllocation(ratio=0.35), 28, 8.5),
    (CosineAllocation(unit_ratio=0.25), 26, 10.0),
    (CosineAllocation(ratio=0.2, layers=5), 5, 10.0),
    (CosineAllocation(ratio=0.2, alpha=0.0), 26, 0.0),
    (CosineAllocation(ratio=0.99), 32, 2.1),
]


@pytest.mark.parametrize(("step", "count", "alpha"), PUBLISHED, ids=[repr(s) for s, *_ in PUBLISHED])
def test_shares_follow_the_similarity_of_the_most_similar_layers(
    step: CosineAllocation, count: int, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(step, SIMILARITY, monkeypatch)
    chosen = sorted(range(32), key=lambda i: -SIMILARITY[i])[:count]
    total = sum(math.exp(alpha * SIMILARITY[i]) for i in chosen)
    assert weights == pytest.approx({i: count * math.exp(alpha * SIMILARITY[i]) / total for i in chosen})


def test_activations_that_are_no_numbers_name_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NumericsError, match=r"the activations of layer layers\.1 hold NaN or infinity"):
        weights_of(CosineAllocation(ratio=0.2), [0.5, math.nan], monkeypatch)


@pytest.mark.parametrize("layers", [0, 3])
def test_more_layers_than_there_are_cannot_be_cut(layers: int) -> None:
    message = rf"^cosine_allocation: layers is {layers}; expected 1 to 2, the layers with sites"
    with pytest.raises(PlanError, match=message):
        CosineAllocation(ratio=0.1, layers=layers)(dense())


def test_similarity_needs_tokens() -> None:
    with pytest.raises(
        CalibrationError, match=r"^cosine_allocation needs calibration tokens; found none in the state$"
    ):
        CosineAllocation(ratio=0.1)(dense(batches=[]))


def test_a_graph_without_sites_cannot_be_allocated() -> None:
    graph = attach(trace(Toy()), State())
    with pytest.raises(PlanError, match=r"^no site can be pruned in this graph"):
        UniformAllocation(ratio=0.1)(graph)


# -- the sweep needs what came before ---------------------------------------------------------------------------------

ALLOCATE = UniformAllocation(ratio=0.1, round_to=1)

MISSING: list[tuple[list[Pass], str]] = [
    ([], "sweep needs numbers of units: put an allocation pass before it, like uniform_allocation"),
    ([Magnitude(), ALLOCATE], "sweep needs a fit: put a recovery pass before it, like regression or no_recovery"),
    ([NoRecovery(), ALLOCATE], "sweep does not know how to choose channels: put an importance pass before it"),
    (
        [Pearson(), NoRecovery(), ALLOCATE],
        "sweep does not know how to choose channels: put an importance pass before it",
    ),
    (
        [FeatureSpace(), NoRecovery(), ALLOCATE],
        "sweep does not know how to choose heads: put an importance pass before it",
    ),
]


@pytest.mark.parametrize(("before", "message"), MISSING)
def test_a_sweep_says_which_pass_is_missing(before: list[Pass], message: str) -> None:
    graph = dense()
    run_passes(graph, before)
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        Sweep()(graph)


def test_an_error_names_its_pass_and_those_before() -> None:
    graph = dense()
    with pytest.raises(PlanError, match=r"like uniform_allocation \[pass sweep, after pearson, verify\]$"):
        run_passes(graph, [Pearson(), Verify(), Sweep()])
    with pytest.raises(PlanError, match=r"like uniform_allocation \[pass sweep\]$"):
        run_passes(graph, [Sweep()])


def test_an_error_of_somebody_elses_pass_names_it_too() -> None:
    def picky(graph_module: fx.GraphModule) -> None:
        raise GraphError("not today")

    with pytest.raises(GraphError, match=r"^not today \[pass picky, after verify\]$"):
        run_passes(dense(), [Verify(), picky])


def test_a_defect_is_not_dressed_up() -> None:
    def broken(graph_module: fx.GraphModule) -> None:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match=r"^a defect$"):
        run_passes(dense(), [broken])


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_applied_as_it_is() -> None:
    plan = Plan({DOWN: Cut(20, ((0, 4, 9),))})
    graph = dense()
    pruned = ApplyPlan(plan.to_dict())(graph).graph_module
    structure = decoder().structure
    torch.testing.assert_close(logits(pruned, IDS), masked_logits(resolve(structure, plan), IDS), rtol=1e-9, atol=1e-9)
    assert state_of(pruned).plan == plan
    assert state_of(pruned).refits == {}


def test_plans_can_follow_each_other() -> None:
    other = "model.layers.1.mlp.down_proj.weight[1]"
    one, two = Plan({DOWN: Cut(20, ((0, 4, 9),))}), Plan({other: Cut(20, ((5, 6),))})
    pruned = run_passes(dense(), [ApplyPlan(one.to_dict()), ApplyPlan(two.to_dict())])
    assert state_of(pruned).plan == one.merged(two)
    twice = ApplyPlan({DOWN: {"units": 3, "keep": [[0, 2]], "within": None}})(pruned).graph_module
    assert state_of(twice).plan == Plan({DOWN: Cut(20, ((0, 9),)), **two.cuts})
    with pytest.raises(PlanError, match="has 2 units; the plan was made for 3"):
        ApplyPlan({DOWN: {"units": 3, "keep": [[0]], "within": None}})(twice)


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^not a plan"):
        ApplyPlan({"a": 3})(dense())


# -- verification -----------------------------------------------------------------------------------------------------


def toy() -> fx.GraphModule:
    return attach(trace(Toy(FeedForward())), State())


def test_a_sound_graph_passes_verification() -> None:
    assert not Verify()(toy()).modified


def test_verification_finds_numbers_that_are_none() -> None:
    graph = toy()
    with torch.no_grad():
        graph.get_parameter("layers.0.up.weight")[2, 1] = math.nan
    with pytest.raises(NumericsError, match=r"^parameter layers\.0\.up\.weight holds NaN or infinity$"):
        Verify()(graph)


def test_verification_finds_weights_that_do_not_fit() -> None:
    graph = toy()
    assign(graph, "layers.0.down.weight", nn.Parameter(torch.zeros(8, 5, dtype=torch.float64)))
    with pytest.raises(GraphError, match=r"^linear_1: aten\.linear\.default does not fit its inputs any more"):
        Verify()(graph)


def test_verification_finds_a_value_that_is_used_before_it_is_made() -> None:
    graph = toy()
    nodes = list(graph.graph.nodes)
    relu = next(n for n in nodes if "relu" in n.name)
    nodes[-2].append(relu)
    with pytest.raises(GraphError, match=r"^the graph is not well formed: "):
        Verify()(graph)


# -- beside other toolchains ------------------------------------------------------------------------------------------


def expand_silu(graph_module: fx.GraphModule) -> PassResult:
    """silu(x) becomes x * sigmoid(x)."""
    found = [n for n in graph_module.graph.nodes if n.target is aten.silu.default]
    for node in found:
        with graph_module.graph.inserting_before(node):
            gate = graph_module.graph.call_function(aten.sigmoid.default, node.args[:1])
            product = graph_module.graph.call_function(aten.mul.Tensor, (node.args[0], gate))
        gate.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        graph_module.graph.erase_node(node)
    graph_module.recompile()
    return PassResult(graph_module, bool(found))


def clone_inputs_of_projections(graph_module: fx.GraphModule) -> PassResult:
    """A copy that does nothing before every projection."""
    for node in [n for n in graph_module.graph.nodes if n.target is aten.linear.default]:
        with graph_module.graph.inserting_before(node):
            copied = graph_module.graph.call_function(aten.clone.default, node.args[:1])
        copied.meta = dict(node.args[0].meta)
        node.args = (copied, *node.args[1:])
    graph_module.recompile()
    return PassResult(graph_module, True)


def leave_rubbish(graph_module: fx.GraphModule) -> PassResult:
    """A node that nobody reads."""
    node = next(n for n in graph_module.graph.nodes if n.target is aten.linear.default)
    with graph_module.graph.inserting_after(node):
        unused = graph_module.graph.call_function(aten.erf.default, (node,))
    unused.meta = dict(node.meta)
    return PassResult(graph_module, True)


def remove_dead_code(graph_module: fx.GraphModule) -> PassResult:
    changed = graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return PassResult(graph_module, changed)


FOREIGN = [expand_silu, clone_inputs_of_projections, leave_rubbish, remove_dead_code]
SLIM = list(method("slimllm", 0.25, round_to=1).passes)

ORDERS = {
    "before": [*FOREIGN, *SLIM],
    "after": [*SLIM, *FOREIGN, Verify()],
    "between": [SLIM[0], FOREIGN[0], SLIM[1], FOREIGN[1], SLIM[2], FOREIGN[2], *SLIM[3:], FOREIGN[3], Verify()],
    "between allocation and sweep": [*SLIM[:4], expand_silu, clone_inputs_of_projections, *SLIM[4:]],
}


@pytest.fixture(scope="module")
def alone() -> tuple[State, Tensor]:
    graph = dense()
    pruned = run_passes(graph, SLIM)
    return state_of(graph), logits(pruned, IDS)


@pytest.mark.parametrize("order", ORDERS)
def test_passes_run_in_a_pass_manager_beside_passes_of_others(order: str, alone: tuple[State, Tensor]) -> None:
    state, expected = alone
    graph = dense()
    result = PassManager(passes=ORDERS[order], run_checks_after_each_pass=True)(graph)
    assert result.modified
    pruned = result.graph_module
    assert state_of(pruned).plan == state.plan
    assert state_of(pruned).budget == state.budget
    torch.testing.assert_close(logits(pruned, IDS), expected, rtol=1e-9, atol=1e-9)
    operators = {operator_name(n) for n in pruned.graph.nodes if n.op == "call_function"}
    assert "aten.silu.default" not in operators
    assert "aten.erf.default" not in operators or "between" in order


def test_a_graph_that_others_changed_is_still_pruned_exactly() -> None:
    graph = dense()
    for foreign in FOREIGN:
        foreign(graph)
    structure = infer(graph)
    plan = Plan({DOWN: Cut(20, ((1, 7),)), **heads_cut()})
    pruned = ApplyPlan(plan.to_dict())(graph).graph_module
    expected = masked_logits(resolve(decoder().structure, plan), IDS)
    torch.testing.assert_close(logits(pruned, IDS), expected, rtol=1e-9, atol=1e-9)
    assert structure.groups.keys() == decoder().structure.groups.keys()


def heads_cut() -> dict[str, Cut]:
    site = decoder().structure.sites[0]
    return units_of(decoder().structure, site, "balanced").cut(torch.tensor([0, 3, 4]))


def test_a_pass_that_forgets_the_state_is_told_so() -> None:
    def forgetful(graph_module: fx.GraphModule) -> PassResult:
        return PassResult(fx.GraphModule(graph_module, graph_module.graph), True)

    with pytest.raises(PlanError, match=r"has to carry its `meta` over \[pass verify, after forgetful\]$"):
        run_passes(dense(), [forgetful, Verify()])


def test_a_pass_of_ones_own_is_a_dataclass_with_a_run() -> None:
    @dataclasses.dataclass(frozen=True)
    class KeepFirst(Pass):
        def run(self, graph_module: fx.GraphModule, state: State) -> None:
            for kind in ("heads", "channels"):
                state.importance[kind] = self

        def select(self, evidence: Any, keep: int) -> Tensor:
            blocks = evidence.blocks
            return torch.cat([(blocks == b).nonzero().flatten()[:keep] for b in range(int(blocks.max()) + 1)])

    try:
        register(KeepFirst)
        graph = dense()
        run_passes(
            graph, [pass_named("keep_first")(), NoRecovery(), UniformAllocation(unit_ratio=0.5, round_to=1), Sweep()]
        )
        cuts = state_of(graph).plan.cuts
        assert cuts
        assert all(row == tuple(range(len(row))) for c in cuts.values() for row in c.keep)
    finally:
        slimgraph.passes.base._PASSES.pop("keep_first")
    with pytest.raises(RecipeError, match="no pass is called 'keep_first'"):
        pass_named("keep_first")


def test_pruning_leaves_the_model_alone() -> None:
    model = make()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    slimgraph.prune(model, IDS, 0.2, round_to=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
