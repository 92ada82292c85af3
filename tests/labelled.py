"""The truth of axis rules by brute force: real operators on sliced inputs against slices of their real outputs.

`Bench` builds a graph of operators as a trace would have made it. `verify` cuts a plan out of such a graph and compares
every node with the promise of its terms, one node at a time:

    op(slice(inputs)) == slice(op(inputs))                for whatever moves positions or works on each by itself,
    op(slice(inputs)) == slice(op(inputs with zeros))     for whatever sums positions away,
    op(slice(inputs)) == slice(op(inputs with -infinity)) for whatever chooses among positions.

Where a statistic other than a sum is taken over what is cut, only shapes are compared. Integers that point to positions
of a cut axis point to the same positions afterwards, under new numbers.

Which positions a slice holds is worked out here from the terms alone, position by position, in plain Python.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slimgraph.axes import Atom, Concat, Product, Term
from slimgraph.errors import PlanError
from slimgraph.groups import Structure, infer
from slimgraph.plan import Cut, Plan, resolve
from slimgraph.rules import operator_name
from slimgraph.surgery import prune_graph

aten = torch.ops.aten

SUMMING = {
    "aten.linear",
    "aten.addmm",
    "aten.matmul",
    "aten.mm",
    "aten.bmm",
    "aten.baddbmm",
    "aten.scaled_dot_product_attention",
    "aten.einsum",
    "aten.conv1d",
    "aten.sum",
}
UNDEFINED = {"aten.empty", "aten.new_empty", "aten.empty_like", "aten.rand_like", "aten.randn_like"}


class Bench:
    """Builds a graph of operators over named tensors; the graph's own input and output are of no interest."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.mode = FakeTensorMode()
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = self.graph.placeholder("input_ids")
        with self.mode:
            self.ids.meta["val"] = torch.zeros(2, 3, dtype=torch.long)

    def source(self, name: str, *shape: int, below: int | None = None, dtype: torch.dtype = torch.float64) -> fx.Node:
        """A tensor of random numbers; of random indices when `below` says how many positions they may point to."""
        if below is not None:
            value = torch.randint(0, below, shape, generator=self.generator)
        elif dtype == torch.bool:
            value = torch.rand(shape, generator=self.generator) > 0.5
        else:
            value = torch.randn(shape, generator=self.generator, dtype=dtype)
        if value.is_floating_point():
            self.root.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return node

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*fx.map_arg(args, _example), **fx.map_arg(kwargs, _example))
        return node

    def module(self) -> fx.GraphModule:
        if not self.graph.find_nodes(op="output"):
            self.graph.output(self.ids)
        return fx.GraphModule(self.root, self.graph).eval()


def _example(node: fx.Node) -> Any:
    return node.meta["val"]


# -- what a cut keeps, position by position ---------------------------------------------------------------------------

Spot = tuple[Any, ...]


class Kept:
    """What a plan keeps of every atom, and where in a tensor that is."""

    def __init__(self, structure: Structure, plan: Plan) -> None:
        self.find = structure.analysis.axes.find
        self.rows = {structure.atom(name): cut.keep for name, cut in plan.cuts.items()}
        self.within = {
            structure.atom(name): structure.atom(cut.within) for name, cut in plan.cuts.items() if cut.within
        }

    def touches(self, term: Term) -> bool:
        return any(spot[1] in self.rows for spot in _leaves(self.find(term)))

    def slice(self, value: Tensor, dims: Sequence[Term]) -> Tensor:
        """The part of a tensor that stays, in the order in which the kept units follow each other."""
        terms = [self.find(t) for t in dims]
        if not self.within:
            for dim, term in enumerate(terms):
                if self.touches(term):
                    value = value.index_select(dim, torch.tensor(self.positions(term)))
            return value
        new = [list(self._spots(t)) for t in terms]
        flat = [self._flat(terms, spots) for spots in itertools.product(*new)]
        return value.reshape(-1)[torch.tensor(flat, dtype=torch.long)].reshape([len(spots) for spots in new])

    def fill(self, value: Tensor, dims: Sequence[Term], filling: float) -> Tensor:
        """The whole tensor with something else in place of what goes."""
        positions = torch.arange(value.numel()).reshape(value.shape)
        stays = torch.zeros(value.numel(), dtype=torch.bool)
        stays[self.slice(positions, dims).reshape(-1)] = True
        return torch.where(stays.reshape(value.shape), value, torch.tensor(filling, dtype=value.dtype))

    def renumber(self, value: Tensor, over: Term) -> Tensor:
        """Integers that are positions of an axis, as positions of what stays of it."""
        new = {old: i for i, old in enumerate(self.positions(over))}
        return torch.tensor([new[i] for i in value.flatten().tolist()], dtype=value.dtype).reshape(value.shape)

    def positions(self, term: Term) -> list[int]:
        """Positions of a single dimension that stay."""
        term = self.find(term)
        return [self._flat([term], (spot,)) for spot in self._spots(term)]

    def _spots(self, term: Term) -> Iterator[Spot]:
        """Every position that a term has after the cut, spelt out down to its atoms."""
        match term:
            case Atom():
                kept = len(self.rows[term][0]) if term in self.rows else term.size
                yield from (("atom", term, i) for i in range(kept))
            case Product(factors):
                yield from (("product", *spots) for spots in itertools.product(*(self._spots(f) for f in factors)))
            case Concat(parts):
                yield from (("part", k, spot) for k, part in enumerate(parts) for spot in self._spots(part))

    def _flat(self, terms: Sequence[Term], spots: Sequence[Spot]) -> int:
        """Where in the original tensor a position of the cut one comes from."""
        flat = 0
        for term, spot in zip(terms, spots, strict=True):
            near = dict(_atoms_of(spot))
            far = {a: i for s in spots for a, i in _atoms_of(s)}
            flat = flat * _size(term) + self._old(term, spot, {**far, **near})
        return flat

    def _old(self, term: Term, spot: Spot, around: dict[Atom, int]) -> int:
        match term:
            case Atom():
                return self._unit(term, spot[2], around)
            case Product(factors):
                at = 0
                for factor, inner in zip(factors, spot[1:], strict=True):
                    at = at * _size(factor) + self._old(factor, inner, around)
                return at
            case Concat(parts):
                return sum(map(_size, parts[: spot[1]])) + self._old(parts[spot[1]], spot[2], around)

    def _unit(self, atom: Atom, index: int, around: dict[Atom, int]) -> int:
        if atom not in self.rows:
            return index
        outer = self.within.get(atom)
        row = 0 if outer is None else self._unit(outer, around[outer], around)
        return self.rows[atom][row][index]


def _atoms_of(spot: Spot) -> Iterator[tuple[Atom, int]]:
    if spot[0] == "atom":
        yield spot[1], spot[2]
    for inner in spot[1:] if spot[0] == "product" else spot[2:] if spot[0] == "part" else ():
        yield from _atoms_of(inner)


def _leaves(term: Term) -> Iterator[tuple[str, Atom]]:
    match term:
        case Atom():
            yield "atom", term
        case Product(children) | Concat(children):
            for child in children:
                yield from _leaves(child)


def _size(term: Term) -> int:
    match term:
        case Atom():
            return term.size
        case Product(factors):
            return math.prod(map(_size, factors))
        case Concat(parts):
            return sum(map(_size, parts))


# -- plans ------------------------------------------------------------------------------------------------------------


def free_groups(structure: Structure) -> list[str]:
    return [g.name for g in structure.groups.values() if g.frozen is None]


def random_plan(structure: Structure, seed: int, *, least: int = 1) -> Plan:
    """Random units of most groups that may be cut, `least` of each or more."""
    dice = random.Random(seed)
    cuts = {}
    for group in (structure.groups[name] for name in free_groups(structure)):
        if dice.random() < 0.8:
            fewest = max(min(group.units, least), group.at_least)
            if fewest > group.units:
                continue
            keep = dice.sample(range(group.units), dice.randint(fewest, group.units))
            cuts[group.name] = Cut(group.units, (tuple(sorted(keep)),))
    return Plan(cuts)


def conditional_plan(structure: Structure, seed: int) -> Plan | None:
    """Units of one group chosen anew for each unit of another, for a random pair where that is allowed."""
    dice = random.Random(seed)
    names = free_groups(structure)
    pairs = [(a, b) for a, b in itertools.permutations(names, 2) if not structure.groups[a].statistics]
    dice.shuffle(pairs)
    for name, within in pairs:
        units, rows = structure.groups[name].units, structure.groups[within].units
        kept = dice.randint(1, units)
        keep = tuple(tuple(sorted(dice.sample(range(units), kept))) for _ in range(rows))
        plan = Plan({name: Cut(units, keep, within)})
        try:
            resolve(structure, plan)
        except PlanError:
            continue
        return plan
    return None


# -- the comparison ---------------------------------------------------------------------------------------------------


def run_all(graph_module: fx.GraphModule, call: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Node name -> value, for every node of a graph; `call` computes a node in another way than by running it."""
    values: dict[fx.Node, Any] = {}
    weights = {**dict(graph_module.named_parameters()), **dict(graph_module.named_buffers())}
    for node in graph_module.graph.nodes:
        match node.op:
            case "placeholder":
                values[node] = torch.tensor([[0, 1, 2], [3, 1, 0]])
            case "get_attr":
                values[node] = weights[node.target]
            case "call_function":
                values[node] = (call or _call)(node, values.__getitem__)
                if _packet(node) in UNDEFINED:
                    values[node] = torch.randn(values[node].shape, dtype=torch.float64)
    return {node.name: value for node, value in values.items()}


def _packet(node: fx.Node) -> str:
    return operator_name(node).rpartition(".")[0] or operator_name(node)


def _call(node: fx.Node, look: Callable[[fx.Node], Any]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return node.target(*fx.map_arg(node.args, look), **fx.map_arg(node.kwargs, look))


def verify(graph_module: fx.GraphModule, plan: Plan, structure: Structure | None = None) -> list[str]:
    """Compare every node of the pruned graph with what its terms promise.

    Returns:
        Names of the nodes of which something was cut.
    """
    structure = structure or infer(graph_module)
    known = len(structure.analysis.axes.links)
    pruned = prune_graph(resolve(structure, plan))
    assert len(structure.analysis.axes.links) == known, "surgery changed what is known about the axes"
    comparison = _Comparison(graph_module, structure, plan, pruned)
    return [n.name for n in pruned.graph.nodes if comparison.of(n)]


class _Comparison:
    def __init__(self, dense: fx.GraphModule, structure: Structure, plan: Plan, pruned: fx.GraphModule) -> None:
        self.analysis = structure.analysis
        self.kept = Kept(structure, plan)
        self.old = {n.name: n for n in dense.graph.nodes}
        self.statistics = {n for n, term in self.analysis.statistics if self.kept.touches(term)}
        self.choices = {c.node for c in self.analysis.choices if self.kept.touches(c.term)}
        self.dense = run_all(dense, self.call_whole)
        self.natural = run_all(pruned)

    def of(self, node: fx.Node) -> bool:
        """Compare one node; whether something of it was cut."""
        before = self.old.get(node.name)
        if before is None or before.op == "output" or before in self.analysis.created:
            return False
        found = _call(node, self.sliced) if before.op == "call_function" else self.natural[node.name]
        expected = self.slice(before)
        assert _shapes(found) == _shapes(node.meta["val"]), f"{node.name}: not the shapes that the metadata says"
        if before.op == "call_function" and (
            _packet(before) in UNDEFINED or (before in self.statistics and _packet(before) not in SUMMING)
        ):
            found, expected = _shapes(found), _shapes(expected)
        _equal(node, found, expected)
        return any(self.kept.touches(t) for t in _flat_terms(self.analysis.terms(before)))

    def call_whole(self, node: fx.Node, look: Callable[[fx.Node], Any]) -> Any:
        """The dense node, on inputs in which what goes neither counts in sums nor can be chosen."""
        filling = None
        if node in self.choices:
            filling = -math.inf
        elif _packet(node) in SUMMING:
            filling = 0.0

        def whole(source: fx.Node) -> Any:
            value = look(source)
            if filling is None or (node in self.choices and source is not node.args[0]):
                return value
            return _each(lambda v, d: self.kept.fill(v, d, filling), value, self.analysis.terms(source))

        return _call(node, whole)

    def sliced(self, source: fx.Node) -> Any:
        """What the pruned node should be given."""
        origin = self.old.get(source.name)
        if origin is None or origin in self.analysis.created:
            return self.natural[source.name]
        return self.slice(origin)

    def slice(self, node: fx.Node) -> Any:
        """The part of a dense value that stays."""
        parts = _each(self.kept.slice, self.dense[node.name], self.analysis.terms(node))
        outputs = parts if isinstance(parts, list) else [parts]
        for (at, i), over in self.analysis.ranges.items():
            if at is node:
                outputs[i] = self.kept.renumber(outputs[i], over)
        return outputs if isinstance(parts, list) else outputs[0]


def _each(function: Callable[[Tensor, Any], Tensor], value: Any, dims: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value, dims)
    if isinstance(value, (list, tuple)):
        return [function(v, d) for v, d in zip(value, dims, strict=True)]
    return value


def _flat_terms(dims: Any) -> list[Term]:
    if dims is None:
        return []
    return list(dims) if isinstance(dims, tuple) else [t for d in dims for t in d]


def _shapes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shapes(v) for v in value]
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _equal(node: fx.Node, found: Any, expected: Any) -> None:
    message = f"{node.name} = {node.target}{node.args}"
    if isinstance(found, tuple):
        found = list(found)
    torch.testing.assert_close(
        found, expected, rtol=1e-10, atol=1e-10, equal_nan=True, check_stride=False, msg=lambda m: f"{message}\n{m}"
    )


# -- terms in a line --------------------------------------------------------------------------------------------------


class Letters:
    """Shows dims in a line, like `(a b×[c|c] 3!)`.

    Letters are axes that may be cut, `3!` is a frozen axis of 3, `~a` one that a statistic is taken over, `^a` one
    whose positions are chosen from.
    """

    def __init__(self, structure: Structure) -> None:
        analysis = structure.analysis
        self.axes = analysis.axes
        self.letters: dict[Atom, str] = {}
        self.counted = {a for _, term in analysis.statistics for a in self.axes.atoms(term)}
        self.chosen = {a for c in analysis.choices for a in self.axes.atoms(c.term)}

    def term(self, term: Term) -> str:
        term = self.axes.find(term)
        match term:
            case Atom():
                if term.frozen is not None:
                    return f"{term.size}!"
                letter = self.letters.setdefault(term, string.ascii_letters[len(self.letters)])
                return "~" * (term in self.counted) + "^" * (term in self.chosen) + letter
            case Product(factors):
                return "×".join(f"[{self.term(f)}]" if isinstance(f, Concat) else self.term(f) for f in factors) or "1"
            case Concat(parts):
                return "|".join(self.term(p) for p in parts)

    def dims(self, dims: Sequence[Term]) -> str:
        return "(" + " ".join(self.term(t) for t in dims) + ")"


def signature(structure: Structure, node: fx.Node) -> str:
    """What a graph's sources and one node's output are made of, like `x(a b) w(c b) -> (a c)`."""
    analysis, letters = structure.analysis, Letters(structure)
    sources = [n for n in analysis.graph_module.graph.nodes if n.op == "get_attr"]
    before = [f"{n.target}{letters.dims(analysis.terms(n))}" for n in sources]
    out = analysis.terms(node)
    after = ", ".join(letters.dims(d) for d in (out if isinstance(out, list) else [out]))
    return " ".join([*before, "->", after])


def parameters_shown(structure: Structure, prefix: str, names: Iterable[str]) -> dict[str, str]:
    """What the named parameters under a module are made of; letters are given out in the order of the names."""
    letters = Letters(structure)
    return {name: letters.dims(structure.analysis.sources[f"{prefix}.{name}"]) for name in names}
