"""Laws of the axis algebra, on random terms and on random chains of the operators that move axes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from labelled import Bench, Kept, aten, conditional_plan, random_plan, verify
from torch import fx

from slimgraph.axes import ONE, Atom, Axes, Concat, Product, Term, size, size_with
from slimgraph.groups import infer
from slimgraph.plan import Cut, Plan, coordinates

laws = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
chains = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


SIZES = [2, 3, 4, 6, 8, 12, 16, 18, 24, 36]

Recipe = tuple[Any, ...]
"""How to build a term: ("atom", name, size, frozen), ("product", recipes) or ("concat", recipes)."""


# -- random terms -----------------------------------------------------------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn, n: int, depth: int = 2) -> Recipe:
    """A term of n positions. Atoms of equal size come from a small pool, so that they occur more than once."""
    kinds = ["atom"]
    if depth and n > 2:
        kinds.append("concat")
        if any(n % d == 0 for d in range(2, n)):
            kinds.append("product")
    match draw(st.sampled_from(kinds)):
        case "product":
            outer = draw(st.sampled_from([d for d in range(2, n) if n % d == 0]))
            return ("product", (draw(recipes(outer, depth - 1)), draw(recipes(n // outer, depth - 1))))
        case "concat":
            first = draw(st.integers(1, n - 1))
            return ("concat", (draw(recipes(first, depth - 1)), draw(recipes(n - first, depth - 1))))
    return ("atom", f"{draw(st.sampled_from('abc'))}{n}", n, draw(st.integers(0, 9)) == 0)


@dataclass
class World:
    """Axes with terms built from recipes; the same recipes make the same world."""

    axes: Axes = field(default_factory=Axes)
    atoms: dict[str, Term] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.axes.cause = "here"

    def build(self, recipe: Recipe) -> Term:
        match recipe:
            case ("atom", name, n, frozen):
                made = self.atoms.setdefault(name, self.axes.atom(n, name, "frozen from the start" if frozen else None))
                return self.axes.find(made)
            case ("product", inner):
                return self.axes.product([self.build(r) for r in inner])
            case (_, inner):
                return self.axes.concat([self.build(r) for r in inner])

    def gave_up(self, *terms: Term) -> bool:
        ours = ("frozen from the start", "a single position")
        return any(a.frozen and not a.frozen.startswith(ours) for t in terms for a in self.axes.atoms(t))

    def made_of(self, *terms: Term) -> list[list[tuple[int, list[int]]]]:
        """What may be cut at every position of the terms, whatever the atoms are called."""
        names: dict[Atom, int] = {}
        return [
            [(names.setdefault(atom, len(names)), where) for atom, where in at.items()]
            for term in terms
            for at in positions(self.axes, [term])
        ]


def positions(axes: Axes, terms: Sequence[Term]) -> list[dict[Atom, list[int]]]:
    """For each position of row-major dimensions: atoms that may be cut -> their coordinates there."""
    per_dim = [_of_term(axes.find(t)) for t in terms]
    return [_merged(combination) for combination in itertools.product(*per_dim)]


def _of_term(term: Term) -> list[dict[Atom, list[int]]]:
    match term:
        case Atom():
            return [{} if term.frozen else {term: [i]} for i in range(term.size)]
        case Product(factors):
            return [_merged(c) for c in itertools.product(*map(_of_term, factors))]
        case Concat(parts):
            return [at for part in parts for at in _of_term(part)]


def _merged(found: Sequence[dict[Atom, list[int]]]) -> dict[Atom, list[int]]:
    out: dict[Atom, list[int]] = {}
    for at in found:
        for atom, where in at.items():
            out.setdefault(atom, []).extend(where)
    return out


def all_terms(term: Term) -> Iterator[Term]:
    yield term
    if not isinstance(term, Atom):
        for child in term.factors if isinstance(term, Product) else term.parts:
            yield from all_terms(child)


def is_normal(term: Term) -> bool:
    """No atom that is bound, nothing nested that could be flat, nothing around a single term."""
    for t in all_terms(term):
        match t:
            case Atom() if t.bound is not None:
                return False
            case Product(children) | Concat(children) if len(children) == 1 or any(
                type(c) is type(t) for c in children
            ):
                return False
            case Concat(children) if any(size(c) == 0 or c == ONE for c in children):
                return False
    return True


# -- unification ------------------------------------------------------------------------------------------------------


@st.composite
def aligned(draw: st.DrawFn) -> tuple[Recipe, Recipe]:
    n = draw(st.sampled_from(SIZES))
    return draw(recipes(n)), draw(recipes(n))


@laws
@given(pair=aligned())
def test_unified_terms_agree_at_every_position(pair: tuple[Recipe, Recipe]) -> None:
    world = World()
    s, t = world.build(pair[0]), world.build(pair[1])
    world.axes.unify(s, t)
    assert positions(world.axes, [s]) == positions(world.axes, [t])
    event(f"all frozen: {world.axes.is_frozen(s)}")


@laws
@given(pair=aligned())
def test_unification_is_symmetric(pair: tuple[Recipe, Recipe]) -> None:
    one, other = World(), World()
    terms = [[w.build(r) for r in pair] for w in (one, other)]
    one.axes.unify(terms[0][0], terms[0][1])
    other.axes.unify(terms[1][1], terms[1][0])
    # Where something has to be given up, the two directions may give up different amounts of it.
    if not one.gave_up(*terms[0]) and not other.gave_up(*terms[1]):
        assert one.made_of(*terms[0]) == other.made_of(*terms[1])


@laws
@given(pair=aligned())
def test_unification_is_idempotent(pair: tuple[Recipe, Recipe]) -> None:
    world = World()
    s, t = world.build(pair[0]), world.build(pair[1])
    world.axes.unify(s, t)
    before, links = world.made_of(s, t), len(world.axes.links)
    world.axes.unify(s, t)
    world.axes.unify(t, s)
    assert positions(world.axes, [s]) == positions(world.axes, [t])
    if not world.gave_up(s, t):
        assert world.made_of(s, t) == before
        assert len(world.axes.links) == links or world.axes.is_frozen(s)


@laws
@given(data=st.data())
def test_unification_is_transitive(data: st.DataObject) -> None:
    world = World()
    n = data.draw(st.sampled_from(SIZES))
    r, s, t = (world.build(data.draw(recipes(n))) for _ in range(3))
    world.axes.unify(r, s)
    world.axes.unify(s, t)
    assert positions(world.axes, [r]) == positions(world.axes, [t])


@laws
@given(pair=aligned())
def test_refinement_keeps_sizes_and_find_is_a_normal_form(pair: tuple[Recipe, Recipe]) -> None:
    world = World()
    terms = [world.build(r) for r in pair]
    sizes = [size(t) for t in terms]
    atoms = {name: size(t) for name, t in world.atoms.items()}
    world.axes.unify(*terms)
    assert [size(world.axes.find(t)) for t in terms] == sizes
    assert {name: size(world.axes.find(t)) for name, t in world.atoms.items()} == atoms
    for term in [*terms, *world.atoms.values()]:
        found = world.axes.find(term)
        assert is_normal(found)
        assert world.axes.find(found) == found
        assert list(world.axes.atoms(term)) == [a for a in all_terms(found) if isinstance(a, Atom)]


@laws
@given(pair=aligned(), when=st.booleans())
def test_freezing_reaches_everything_unified(pair: tuple[Recipe, Recipe], when: bool) -> None:
    world = World()
    s, t = world.build(pair[0]), world.build(pair[1])
    if when:
        world.axes.freeze(s, "asked for")
    world.axes.unify(s, t)
    if not when:
        world.axes.freeze(s, "asked for")
    assert world.axes.is_frozen(s)
    assert world.axes.is_frozen(t)


@laws
@given(pair=aligned())
def test_whatever_alignment_freezes_says_where(pair: tuple[Recipe, Recipe]) -> None:
    world = World()
    terms = [world.build(r) for r in pair]
    world.axes.unify(*terms)
    reasons = {a.frozen for t in terms for a in world.axes.atoms(t)} - {None, "frozen from the start"}
    for reason in reasons:
        assert " at here" in reason


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (6, (2, 3), "a:2 × b:3"),
        (6, (3, 2), "a:3 × b:2"),
        ((2, 3), (2, 3), "a:2 × b:3"),
        ((2, 6), (4, 3), "a.0:2 × a.1:2 × b:3"),
        ((8, 3), (2, 12), "a:2 × b.0:4 × b.1:3"),
    ],
)
def test_products_are_aligned_factor_by_factor(first: Any, second: Any, shown: str) -> None:
    axes = Axes()

    def term(sizes: Any) -> Term:
        listed = sizes if isinstance(sizes, tuple) else (sizes,)
        return axes.product([axes.atom(n, label) for n, label in zip(listed, "ab", strict=False)])

    s, t = term(first), term(second)
    axes.unify(s, t)
    assert axes.find(s) == axes.find(t)
    assert axes.show(s) == shown


def test_concatenations_are_aligned_at_their_common_refinement() -> None:
    axes = Axes()
    s = axes.concat([axes.atom(4, "a"), axes.atom(5, "b")])
    t = axes.concat([axes.atom(2, "c"), axes.atom(7, "d")])
    axes.unify(s, t)
    assert axes.show(s) == axes.show(t) == "c:2 | a.1:2 | b:5"


def test_terms_that_cannot_be_aligned_are_frozen_and_say_where() -> None:
    axes = Axes()
    axes.cause = "add_3"
    s = axes.product([axes.atom(4, "a"), axes.atom(6, "b")])
    t = axes.product([axes.atom(6, "c"), axes.atom(4, "d")])
    axes.unify(s, t)
    assert axes.is_frozen(s)
    assert axes.is_frozen(t)
    reason = next(axes.atoms(s)).frozen
    assert reason is not None
    assert reason.endswith("meet at add_3 and cannot be aligned")


def test_an_axis_that_would_contain_itself_is_frozen() -> None:
    axes = Axes()
    axes.cause = "view_2"
    a, single = axes.atom(6, "a"), axes.concat([ONE])
    axes.unify(a, axes.product([a, single]))
    assert axes.is_frozen(a)
    assert axes.find(a) is a


def test_terms_of_different_sizes_are_refused() -> None:
    axes = Axes()
    with pytest.raises(ValueError, match=r"^cannot align x:4 with y:5: sizes 4 and 5$"):
        axes.unify(axes.atom(4, "x"), axes.atom(5, "y"))


def test_a_merge_remembers_its_node() -> None:
    axes = Axes()
    x, y, h, d = (axes.atom(n, label) for n, label in [(6, "x"), (6, "y"), (2, "h"), (3, "d")])
    axes.cause = "add"
    axes.unify(x, y)
    axes.cause = "view"
    axes.unify(y, axes.product([h, d]))
    assert [(k.first, k.second, k.cause, k.how) for k in axes.links] == [
        (x, y, "add", "equal"),
        (y, h, "view", "piece"),
        (y, d, "view", "piece"),
    ]


# -- splitting --------------------------------------------------------------------------------------------------------


@st.composite
def compositions(draw: st.DrawFn, n: int, most: int = 4) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=most - 1)) - {n})
    return [b - a for a, b in itertools.pairwise([0, *cuts, n])]


@st.composite
def shapes(draw: st.DrawFn, n: int) -> list[int]:
    """Sizes whose product is n, some of them 1."""
    out = []
    while n > 1:
        d = draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0]))
        out.append(d)
        n //= d
    for _ in range(draw(st.integers(0, 1))):
        out.insert(draw(st.integers(0, len(out))), 1)
    return out or [1]


@laws
@given(data=st.data())
def test_pieces_lie_end_to_end(data: st.DataObject) -> None:
    world = World()
    n = data.draw(st.sampled_from(SIZES))
    term = world.build(data.draw(recipes(n)))
    sizes = data.draw(compositions(n))
    pieces = world.axes.cut(term, sizes)
    assert [size(p) for p in pieces] == sizes
    assert positions(world.axes, [term]) == [at for p in pieces for at in positions(world.axes, [p])]


@laws
@given(data=st.data())
def test_factors_multiply_to_the_whole(data: st.DataObject) -> None:
    world = World()
    n = data.draw(st.sampled_from(SIZES))
    term = world.build(data.draw(recipes(n)))
    inner = data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    found = world.axes.factor(term, inner)
    if found is not None:
        assert [size(f) for f in found] == [n // inner, inner]
        assert positions(world.axes, [term]) == positions(world.axes, found)


@laws
@given(data=st.data())
def test_a_reshape_keeps_every_position(data: st.DataObject) -> None:
    world = World()
    n = data.draw(st.sampled_from(SIZES))
    dims = [world.build(data.draw(recipes(m, depth=1))) for m in data.draw(shapes(n))]
    sizes = data.draw(shapes(n))
    result = world.axes.reshape(dims, sizes)
    assert [size(t) for t in result] == sizes
    assert positions(world.axes, dims) == positions(world.axes, result)


@laws
@given(data=st.data())
def test_a_reshape_back_gives_the_same_terms(data: st.DataObject) -> None:
    world = World()
    n = data.draw(st.sampled_from(SIZES))
    dims = [world.axes.atom(m, f"x{i}") for i, m in enumerate(data.draw(shapes(n)))]
    result = world.axes.reshape(dims, data.draw(shapes(n)))
    assume(not any(world.axes.is_frozen(d) for d in dims if size(d) > 1))
    back = world.axes.reshape(result, [size(d) for d in dims])
    assert list(back) == [world.axes.find(d) for d in dims]


def test_a_cut_across_rows_keeps_the_rows() -> None:
    axes = Axes()
    axes.cause = "split"
    heads, width = axes.atom(2, "h"), axes.atom(4, "d")
    first, second = axes.cut(axes.product([heads, width]), (3, 5))
    assert axes.show(first) == "d.0:3"
    assert axes.show(second) == "d.1:1! | d.0:3 | d.1:1!"
    assert axes.show(heads) == "h:2!"


def test_a_cut_across_too_many_rows_is_frozen() -> None:
    axes = Axes()
    term = axes.product([axes.atom(5000, "h"), axes.atom(4, "d")])
    pieces = axes.cut(term, (3, 19997))
    assert axes.is_frozen(term)
    assert all(axes.is_frozen(p) for p in pieces)


@pytest.mark.parametrize(
    ("parts", "inner", "outer", "shown"),
    [
        ((6, 6), 3, "p0.0:2 | p1.0:2", "(p0.0:2 × p1.1:3) | (p1.0:2 × p1.1:3)"),
        ((4, 8), 4, "joined:1! | p1.0:2", "p1.1:4 | (p1.0:2 × p1.1:4)"),
        ((3, 3), 3, "rows:2!", "p1:3 | p1:3"),
        ((6, 4), 5, "rows:2!", "p0.1:1! | p1:4 | p0.1:1! | p1:4"),
    ],
)
def test_a_concatenation_has_factors(parts: tuple[int, ...], inner: int, outer: str, shown: str) -> None:
    axes = Axes()
    term = axes.concat([axes.atom(n, f"p{i}") for i, n in enumerate(parts)])
    found = axes.factor(term, inner)
    assert found is not None
    assert axes.show(found[0]) == outer
    assert size(found[1]) == inner
    assert axes.show(term) == shown


def test_wrong_sizes_are_refused() -> None:
    axes = Axes()
    x = axes.atom(6, "x")
    with pytest.raises(ValueError, match=r"^cannot cut x:6 into \[2, 3\]$"):
        axes.cut(x, (2, 3))
    with pytest.raises(ValueError, match=r"^cannot reshape \['x:6'\] to \[2, 4\]$"):
        axes.reshape((x,), (2, 4))
    assert axes.factor(x, 4) is None


# -- reading terms ----------------------------------------------------------------------------------------------------


@laws
@given(data=st.data())
def test_coordinates_say_what_every_position_is_made_of(data: st.DataObject) -> None:
    world = World()
    n = data.draw(st.sampled_from(SIZES))
    term = world.build(data.draw(recipes(n)))
    found = coordinates(term)
    for atom in world.axes.atoms(term):
        atom.frozen = None
    for p, at in enumerate(positions(world.axes, [term])):
        assert {a: sorted(int(c[p]) for c in arrays if c[p] >= 0) for a, arrays in found.items()} == {
            **{a: [] for a in found},
            **{a: sorted(where) for a, where in at.items()},
        }


@laws
@given(data=st.data())
def test_sizes_after_a_cut_are_those_of_what_stays(data: st.DataObject) -> None:
    world = World()
    term = world.build(data.draw(recipes(data.draw(st.sampled_from(SIZES)))))
    atoms = list(dict.fromkeys(world.axes.atoms(term)))
    kept = {a: data.draw(st.integers(1, a.size)) for a in atoms if a.size > 1}
    for atom in atoms:
        atom.frozen = None
    stays = [at for at in positions(world.axes, [term]) if all(i < kept.get(a, 1) for a, w in at.items() for i in w)]
    assert size_with(term, kept) == len(stays)
    assert size_with(term, {}) == size(term)


def test_terms_are_shown_in_a_line() -> None:
    axes = Axes()
    rot, rest = axes.atom(4, "rot"), axes.atom(8, "rest", "fixed")
    term = axes.product([axes.atom(3, "h"), axes.concat([axes.product([rot, axes.atom(2, "p")]), rest, ONE])])
    assert axes.show(term) == "h:3 × ((rot:4 × p:2) | rest:8! | joined:1!)"
    assert axes.show(ONE) == "1"


# -- chains of operators ----------------------------------------------------------------------------------------------


@st.composite
def chain_of_moves(draw: st.DrawFn) -> fx.GraphModule:
    """A tensor or two sent through operators that only move positions."""
    bench = Bench()
    nodes = [bench.source("x", *draw(st.sampled_from([(2, 12), (3, 4, 2), (24,), (4, 6), (2, 3, 4)])))]
    for i in range(draw(st.integers(2, 6))):
        node = draw(st.sampled_from(nodes))
        shape = list(node.meta["val"].shape)
        dim = draw(st.integers(0, len(shape) - 1))
        match draw(
            st.sampled_from(["view", "permute", "split", "cat", "expand", "unflatten", "slice", "stack", "add"])
        ):
            case "view":
                nodes.append(bench(aten.reshape.default, node, draw(shapes(int(torch.tensor(shape).prod())))))
            case "permute":
                nodes.append(bench(aten.permute.default, node, draw(st.permutations(range(len(shape))))))
            case "split":
                sizes = draw(compositions(shape[dim], 3))
                out = bench(aten.split_with_sizes.default, node, sizes, dim)
                nodes.append(bench(operator.getitem, out, draw(st.integers(0, len(sizes) - 1))))
            case "cat":
                other = bench.source(
                    f"y{i}", *(draw(st.integers(1, 4)) if d == dim else n for d, n in enumerate(shape))
                )
                nodes.append(bench(aten.cat.default, draw(st.permutations([node, other, node])), dim))
            case "expand":
                wide = bench(aten.unsqueeze.default, node, dim)
                nodes.append(bench(aten.expand.default, wide, [*shape[:dim], draw(st.integers(2, 3)), *shape[dim:]]))
            case "unflatten":
                nodes.append(bench(aten.unflatten.int, node, dim, draw(shapes(shape[dim]))))
            case "slice":
                first = draw(st.integers(0, shape[dim] - 1))
                last = draw(st.integers(first + 1, shape[dim]))
                if last - first == shape[dim]:
                    continue
                nodes.append(bench(aten.slice.Tensor, node, dim, first, last))
            case "stack":
                nodes.append(bench(aten.stack.default, [node, bench.source(f"y{i}", *shape)], dim))
            case "add":
                nodes.append(bench(aten.add.Tensor, node, bench.source(f"y{i}", *shape)))
        if nodes[-1].meta["val"].numel() > 600:
            nodes.pop()
    return bench.module()


@chains
@given(graph_module=chain_of_moves(), seed=st.integers(0, 99))
def test_chains_of_moves_do_to_slices_what_the_terms_say(graph_module: fx.GraphModule, seed: int) -> None:
    structure = infer(graph_module)
    cut = verify(graph_module, random_plan(structure, seed, least=2), structure)
    event(f"something cut: {bool(cut)}")


@settings(chains, phases=[Phase.explicit, Phase.generate])
@given(graph_module=chain_of_moves(), seed=st.integers(0, 99))
def test_chains_of_moves_do_so_when_the_choice_depends_on_another_group(
    graph_module: fx.GraphModule, seed: int
) -> None:
    structure = infer(graph_module)
    plan = conditional_plan(structure, seed)
    event(f"something cut: {plan is not None}")
    if plan is not None:
        verify(graph_module, plan, structure)


def test_what_a_conditional_cut_keeps_is_worked_out_by_hand_once() -> None:
    bench = Bench()
    bench(aten.view.default, bench.source("x", 6), [2, 3])
    structure = infer(bench.module())
    kept = Kept(structure, Plan({"x[0].1": Cut(3, ((0, 2), (1, 2)), within="x[0].0")}))
    assert kept.positions(structure.analysis.sources["x"][0]) == [0, 2, 4, 5]
