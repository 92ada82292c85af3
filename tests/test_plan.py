"""Plans are data, are checked before anything is cut, and select what brute force selects."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import torch
from decoders import MANY_HEADS, decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import Bench, Kept, aten, conditional_plan, free_groups, random_plan, verify

from slimgraph.errors import PlanError
from slimgraph.evidence import Evidence
from slimgraph.groups import Structure, infer
from slimgraph.plan import Cut, Plan, resolve
from slimgraph.surgery import prune_graph
from slimgraph.trace import tensor_at
from slimgraph.units import HEAD_MODES, origin_units, parameter_count, units_of

O_PROJ = "model.layers.0.self_attn.o_proj.weight[1]"
KV, HEADS = f"{O_PROJ}.0", f"{O_PROJ}.1"
DOWN = "model.layers.0.mlp.down_proj.weight[1]"

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("phi3", {}),
]
every_family = pytest.mark.parametrize(("family", "changes"), FAMILIES)


# -- data -------------------------------------------------------------------------------------------------------------


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    units = draw(st.integers(1, 9))
    kept = draw(st.integers(1, units))
    within = draw(st.none() | st.text(max_size=5))
    rows = 1 if within is None else draw(st.integers(1, 3))
    keep = tuple(tuple(sorted(draw(st.permutations(range(units)))[:kept])) for _ in range(rows))
    return Cut(units, keep, within)


groups_cut = st.dictionaries(st.text(max_size=8), cuts(), max_size=4)
layers = st.lists(st.text(max_size=8).map("layers.".__add__), max_size=3, unique=True).map(tuple)
plans = st.builds(Plan, groups_cut, layers)


@settings(max_examples=50, deadline=None)
@given(plan=plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@settings(max_examples=50, deadline=None)
@given(plan=plans, data=st.data())
def test_a_plan_is_the_sum_of_its_parts(plan: Plan, data: st.DataObject) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(plan.cuts)))) if plan.cuts else set()
    place = data.draw(st.integers(0, len(plan.skipped)))
    one = Plan({n: c for n, c in plan.cuts.items() if n in names}, plan.skipped[:place])
    other = Plan({n: c for n, c in plan.cuts.items() if n not in names}, plan.skipped[place:])
    assert one.merged(other) == plan
    assert other.merged(one).cuts == plan.cuts
    assert set(other.merged(one).skipped) == set(plan.skipped)


def test_a_group_is_cut_once() -> None:
    plan = Plan({"a": Cut(3, ((0,),))})
    with pytest.raises(PlanError, match=r"^group 'a' is cut by both plans; a group can be cut once$"):
        plan.merged(Plan({"b": Cut(3, ((1,),)), "a": Cut(3, ((1,),))}))


def _thinned(structure: Structure, seed: int) -> Plan:
    """Two or more units of everything, or of each kv group other ones."""
    dice = random.Random(seed)
    if seed % 2:
        return random_plan(structure, seed, least=2)
    cuts = {}
    for outer, inner in (s.groups for s in structure.sites if len(s.groups) == 2):
        rows, units = structure.groups[outer].units, structure.groups[inner].units
        kept = dice.randint(2, units)
        cuts[inner] = Cut(units, tuple(tuple(sorted(dice.sample(range(units), kept))) for _ in range(rows)), outer)
        if dice.random() < 0.5:
            cuts[outer] = Cut(rows, (tuple(sorted(dice.sample(range(rows), 2))),))
    return Plan(cuts)


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", MANY_HEADS), ("phi3", MANY_HEADS), ("gpt2", {}), ("gpt_neox", {})]
)
def test_one_plan_and_then_another_is_both_at_once(family: str, changes: dict[str, Any]) -> None:
    dense = decoder(family, **changes).structure
    for seed in range(8):
        first = _thinned(dense, seed // 2)
        between = infer(prune_graph(resolve(dense, first)))
        second = _thinned(between, seed)
        both = first.then(second)
        expected = dict(prune_graph(resolve(between, second)).named_parameters())
        for start, plan in ((dense, both), (between, both.since(first))):
            found = dict(prune_graph(resolve(start, plan)).named_parameters())
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


@settings(max_examples=30, deadline=None)
@given(plan=plans)
def test_nothing_and_then_a_plan_is_that_plan(plan: Plan) -> None:
    assert Plan().then(plan) == plan


def test_a_layer_that_a_later_plan_skips_is_not_cut() -> None:
    plan = Plan({"layers.1.a": Cut(3, ((0,),)), "layers.2.a": Cut(3, ((0,),))}, ("layers.0",))
    later = Plan({}, ("layers.1",))
    both = plan.then(later)
    assert both == Plan({"layers.2.a": Cut(3, ((0,),))}, ("layers.0", "layers.1"))
    assert both.since(plan) == later


NOT_AFTERWARDS = [
    (
        {"a": Cut(3, ((0, 2),))},
        {"a": Cut(3, ((0,),))},
        "group 'a' has 2 units left of 3; the later plan was made for 3",
    ),
    (
        {"a": Cut(3, ((0, 1), (1, 2)), "b")},
        {"a": Cut(2, ((0,), (1,)), "c")},
        "group 'a' was cut within 'b', and now within 'c'; expected the same group, or none",
    ),
    (
        {"a": Cut(3, ((0, 1), (1, 2)), "b")},
        {"c": Cut(2, ((0,), (1,)), "a")},
        "group 'c' cannot be cut within 'a', of which other units stay for each unit of 'b'",
    ),
]


@pytest.mark.parametrize(("first", "second", "message"), NOT_AFTERWARDS)
def test_a_plan_for_another_model_does_not_follow(first: dict[str, Cut], second: dict[str, Cut], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        Plan(first).then(Plan(second))


def test_a_later_choice_that_is_the_same_everywhere_is_said_once() -> None:
    first = Plan({"a": Cut(3, ((0, 1), (1, 2)), "b")})
    later = Plan({"a": Cut(2, ((0,),))})
    assert first.then(later).since(first) == later


NOT_SINCE: list[tuple[Plan, Plan, str]] = [
    (
        Plan({"a": Cut(3, ((0, 2),))}),
        Plan({"a": Cut(3, ((1, 2),))}),
        "group 'a' keeps unit 1, which the earlier plan removes",
    ),
    (
        Plan({"a": Cut(4, ((0, 2),))}),
        Plan({"a": Cut(3, ((2,),))}),
        "group 'a' has 3 units, chosen within None; the earlier plan was made for 4 within None",
    ),
    (
        Plan({"a": Cut(3, ((0, 1), (1, 2)), "b")}),
        Plan({"a": Cut(3, ((1,),))}),
        "group 'a' has 3 units, chosen within None; the earlier plan was made for 3 within 'b'",
    ),
    (Plan({"a": Cut(3, ((0, 2),))}), Plan(), "group 'a' is cut by the earlier plan and not by this one"),
    (Plan({}, ("layers.0",)), Plan(), "layer 'layers.0' is skipped by the earlier plan and not by this one"),
]


@pytest.mark.parametrize(("earlier", "plan", "message"), NOT_SINCE)
def test_a_plan_that_did_not_come_after_another(earlier: Plan, plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        plan.since(earlier)


NO_PLANS = [
    "{",
    "[]",
    "3",
    '{"a": 3}',
    '{"a": {"units": 3}}',
    '{"a": {"units": 3, "keep": [0, 1], "within": null}}',
    '{"a": {"units": "many", "keep": [[0]], "within": null}}',
    '{"a": {"units": 3, "keep": [["x"]], "within": null}}',
    '{"a": {"units": 3, "keep": [[0.7, 1.2]], "within": null}}',
    '{"a": {"units": 3, "keep": [[true, 2]], "within": null}}',
    '{"a": {"units": 3, "keep": ["12"], "within": null}}',
    '{"a": {"units": "3", "keep": [[1, 2]], "within": null}}',
    '{"a": {"units": 3, "keep": [[1, 2]], "within": 0}}',
    '{"a": {"units": 3, "keep": [[1, 2]], "within": null, "kept": 1}}',
]


@pytest.mark.parametrize("text", NO_PLANS)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"^not a plan"):
        Plan.from_json(text)


# -- checks -----------------------------------------------------------------------------------------------------------

ROWS = tuple((0,) for _ in range(3))

ERRORS = [
    ({"nope": Cut(3, ((0,),))}, "no group is called 'nope'; `slimgraph inspect` lists the 12 groups there are"),
    (
        {"lm_head.weight[0]": Cut(40, ((0,),))},
        "group 'lm_head.weight[0]' is frozen and cannot be cut: the model's output",
    ),
    ({DOWN: Cut(19, ((0,),))}, f"group '{DOWN}' has 20 units; the plan was made for 19"),
    ({DOWN: Cut(20, ((0,), (1,)))}, f"group '{DOWN}': found 2 rows of units, expected 1"),
    ({DOWN: Cut(20, ())}, f"group '{DOWN}': found 0 rows of units, expected 1"),
    ({HEADS: Cut(2, ((0,),), KV)}, f"group '{HEADS}': found 1 rows of units, expected 3"),
    ({HEADS: Cut(2, ROWS, "nope")}, "no group is called 'nope'; `slimgraph inspect` lists the 12 groups there are"),
    ({DOWN: Cut(20, ((1, 0),))}, f"group '{DOWN}': units must ascend within 0..19; found (1, 0)"),
    ({DOWN: Cut(20, ((1, 1),))}, f"group '{DOWN}': units must ascend within 0..19; found (1, 1)"),
    ({DOWN: Cut(20, ((-1, 0),))}, f"group '{DOWN}': units must ascend within 0..19; found (-1, 0)"),
    ({DOWN: Cut(20, ((0, 20),))}, f"group '{DOWN}': units must ascend within 0..19; found (0, 20)"),
    (
        {HEADS: Cut(2, ((0,), (0, 1), (1,)), KV)},
        f"group '{HEADS}': every row must keep the same number of units, at least one; found (0, 1)",
    ),
    ({DOWN: Cut(20, ((),))}, f"group '{DOWN}' must keep at least 1 units; found ()"),
]


@pytest.mark.parametrize(("wanted", "message"), ERRORS)
def test_an_impossible_plan_is_refused_with(wanted: dict[str, Cut], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        resolve(decoder().structure, Plan(wanted))


def test_a_choice_within_a_group_needs_that_group_everywhere() -> None:
    structure = decoder().structure
    value_channels = "model.layers.0.self_attn.v_proj.weight[0].1"
    plan = Plan({value_channels: Cut(4, ((0,), (1,)), HEADS)})
    with pytest.raises(
        PlanError, match=r"cannot be cut differently for each unit of .* holds the one without the other"
    ):
        resolve(structure, plan)
    resolve(structure, Plan({value_channels: Cut(4, ((0,), (1,), (2,)), KV)}))


def outer_product(b: Bench) -> None:
    b(aten.view.default, b.source("x", 2, 3), [6])


def halves(b: Bench) -> None:
    """Two axes next to each other in one dimension: neither is there for the other."""
    b(aten.split_with_sizes.default, b.source("x", 7), [3, 4])


def inner_first(b: Bench) -> None:
    b(aten.view.default, b.source("x", 6), [3, 2])


SOMEWHERE_ELSE = [
    ("in another part of the dimension", halves, {"x[0].1": Cut(4, ((0,), (1,), (2,)), "x[0].0")}),
    ("in another dimension", outer_product, {"x[1]": Cut(3, ((0,), (1,)), "x[0]")}),
    ("further inside", inner_first, {"x[0].0": Cut(3, ((0, 1), (1, 2)), "x[0].1")}),
    ("the group itself", inner_first, {"x[0].0": Cut(3, ((0,), (1,), (2,)), "x[0].0")}),
]


@pytest.mark.parametrize(
    ("build", "wanted"),
    [pytest.param(b, w, id=where) for where, b, w in SOMEWHERE_ELSE],
)
def test_a_choice_within_a_group_is_refused_or_exact_where_that_group_is(build: Any, wanted: dict[str, Cut]) -> None:
    bench = Bench()
    build(bench)
    graph_module = bench.module()
    structure = infer(graph_module)
    try:
        resolve(structure, Plan(wanted))
    except PlanError:
        return
    verify(graph_module, Plan(wanted), structure)


# -- selections -------------------------------------------------------------------------------------------------------


def assert_selects(structure: Structure, plan: Plan) -> None:
    resolved = resolve(structure, plan)
    kept = Kept(structure, plan)
    for source, dims in structure.analysis.sources.items():
        expected = {d: kept.positions(t) for d, t in enumerate(dims) if kept.touches(t)}
        found = {d: p.tolist() for d, p in resolved.selections.get(source, {}).items()}
        assert found == expected, source
        assert resolved.shape(source) == tuple(len(kept.positions(t)) for t in dims)
        assert [resolved.size_of(t) for t in dims] == [len(kept.positions(t)) for t in dims]
    for name, tensor in structure.analysis.graph_module.named_parameters():
        torch.testing.assert_close(resolved.select(name, tensor), kept.slice(tensor, structure.analysis.sources[name]))
        if name not in resolved.selections:
            assert resolved.select(name, tensor) is tensor


@every_family
def test_selections_are_those_of_brute_force(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    for seed in range(5):
        assert_selects(structure, random_plan(structure, seed))


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("phi3", {})])
def test_selections_of_conditional_cuts_are_those_of_brute_force(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    sites = [s for s in structure.sites if len(s.groups) == 2]
    for seed in range(5):
        dice = random.Random(seed)
        cuts = {}
        for site in sites:
            outer, inner = site.groups
            rows, units = structure.groups[outer].units, structure.groups[inner].units
            kept = dice.randint(1, units)
            keep = tuple(tuple(sorted(dice.sample(range(units), kept))) for _ in range(rows))
            cuts[inner] = Cut(units, keep, outer)
            cuts[outer] = Cut(rows, (tuple(sorted(dice.sample(range(rows), dice.randint(1, rows)))),))
        assert_selects(structure, Plan(cuts))


def test_heads_within_kv_groups_are_the_conditional_cut_that_a_decoder_allows() -> None:
    structure = decoder().structure
    assert {
        (c.within, n) for seed in range(30) if (p := conditional_plan(structure, seed)) for n, c in p.cuts.items()
    } >= {(KV, HEADS)}


def test_an_empty_plan_selects_nothing() -> None:
    structure = decoder().structure
    resolved = resolve(structure, Plan())
    assert resolved.selections == {}
    for name, parameter in structure.analysis.graph_module.named_parameters():
        assert resolved.shape(name) == tuple(parameter.shape)


def test_keeping_everything_selects_every_position() -> None:
    structure = decoder().structure
    units = {name: structure.groups[name].units for name in free_groups(structure)}
    resolved = resolve(structure, Plan({name: Cut(n, (tuple(range(n)),)) for name, n in units.items()}))
    for name, parameter in structure.analysis.graph_module.named_parameters():
        assert resolved.shape(name) == tuple(parameter.shape)
        for dim, positions in resolved.selections[name].items():
            assert positions.tolist() == list(range(parameter.shape[dim]))


# -- units ------------------------------------------------------------------------------------------------------------


def site_named(structure: Structure, name: str) -> Any:
    return next(s for s in structure.sites if s.name == name)


UNITS = [
    (O_PROJ, {}, "auto", HEADS, KV, [c // 4 for c in range(24)], [0, 0, 1, 1, 2, 2]),
    (O_PROJ, {}, "balanced", HEADS, KV, [c // 4 for c in range(24)], [0, 0, 1, 1, 2, 2]),
    (O_PROJ, {}, "kv", KV, None, [c // 8 for c in range(24)], [0, 0, 0]),
    (O_PROJ, {"num_key_value_heads": 6}, "auto", KV, None, [c // 4 for c in range(24)], [0] * 6),
    (O_PROJ, {"num_key_value_heads": 6}, "balanced", KV, None, [c // 4 for c in range(24)], [0] * 6),
    (O_PROJ, {"num_key_value_heads": 1}, "kv", KV, None, [c // 4 for c in range(24)], [0] * 6),
    (DOWN, {}, "auto", DOWN, None, list(range(20)), [0] * 20),
]


@pytest.mark.parametrize(("name", "changes", "heads", "group", "within", "members", "blocks"), UNITS)
def test_units_of_a_site_are(
    name: str,
    changes: dict[str, Any],
    heads: str,
    group: str,
    within: str | None,
    members: list[int],
    blocks: list[int],
) -> None:
    structure = decoder(**changes).structure
    units = units_of(structure, site_named(structure, name), heads)
    assert (units.group, units.within) == (group, within)
    assert units.members.tolist() == members
    assert units.blocks.tolist() == blocks
    assert units.block_count == len(set(blocks))
    assert units.block_size == len(blocks) // len(set(blocks))


def test_an_unknown_head_mode_is_refused() -> None:
    structure = decoder().structure
    with pytest.raises(PlanError, match=r"^heads is 'all'; expected one of auto, kv, balanced$"):
        units_of(structure, structure.sites[0], "all")


ORIGIN_UNITS = [
    ("llama", "balanced", [[r // 4 for r in range(24)], [-1] * 12, [-1] * 12]),
    ("llama", "kv", [[r // 8 for r in range(24)], [r // 4 for r in range(12)], [r // 4 for r in range(12)]]),
    ("gpt2", "auto", [[r % 24 // 6 for r in range(72)]]),
    ("gpt_neox", "auto", [[r // 24 for r in range(72)]]),
    ("phi3", "balanced", [[r // 4 for r in range(24)] + [-1] * 24]),
    ("phi3", "kv", [[r // 8 for r in range(24)] + [r // 4 for r in range(12)] * 2]),
]


@pytest.mark.parametrize(("family", "heads", "expected"), ORIGIN_UNITS)
def test_rows_that_produce_a_unit_are(family: str, heads: str, expected: list[list[int]]) -> None:
    structure = decoder(family).structure
    site = next(s for s in structure.sites if s.kind == "heads")
    units = units_of(structure, site, heads)
    assert [origin_units(structure, units, o).tolist() for o in site.origins] == expected


@every_family
@pytest.mark.parametrize("heads", HEAD_MODES)
def test_the_plan_of_chosen_units_keeps_their_channels(family: str, changes: dict[str, Any], heads: str) -> None:
    structure = decoder(family, **changes).structure
    dice = random.Random(0)
    for site in structure.prunable_sites():
        units = units_of(structure, site, heads)
        keep = dice.randint(1, units.block_size)
        kept = sorted(
            b * units.block_size + u
            for b in range(units.block_count)
            for u in dice.sample(range(units.block_size), keep)
        )
        cut = units.cut(torch.tensor(kept))
        assert (cut == {}) == (keep == units.block_size)
        resolved = resolve(structure, Plan(cut))
        channels = channels_kept(units.members, units.blocks, kept)
        selected = resolved.selections.get(site.parameter, {}).get(site.in_dim)
        assert channels == (list(range(site.channels)) if selected is None else selected.tolist())
        for origin in site.origins:
            rows = origin_units(structure, units, origin)
            stays = [i for i, u in enumerate(rows.tolist()) if u < 0 or u in kept]
            selected = resolved.selections.get(origin.parameter, {}).get(origin.dim)
            # Rows of a kv group that the plan only thins out belong to no single unit, and stay.
            assert stays == (list(range(len(rows))) if selected is None else selected.tolist())


def channels_kept(members: torch.Tensor, blocks: torch.Tensor, kept: list[int]) -> list[int]:
    channels = len(members)
    evidence = Evidence(torch.zeros(1, channels), None, [], members, blocks, (), "heads", "")
    return evidence.kept_channels(torch.tensor(kept)).tolist()


@every_family
def test_parameters_are_counted_as_they_are_after_the_cut(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    sizes = {n: p.numel() for n, p in structure.analysis.graph_module.named_parameters()}
    for seed in range(3):
        plan = random_plan(structure, seed)
        resolved = resolve(structure, plan)
        weights = structure.analysis.graph_module
        real = sum(resolved.select(n, tensor_at(weights, n)).numel() for n in sizes)
        assert parameter_count(structure, {n: c.kept for n, c in plan.cuts.items()}, sizes) == real
