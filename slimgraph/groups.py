"""Groups, sites and layers, read off an analysed graph.

Which layer a site belongs to follows from where in the module tree its node was traced; what a group is (heads,
channels, experts, the residual stream) from what the graph does with it. All of this is structure, never names: names
of parameters serve to label what was found.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from slimgraph.analysis import Analysis, analyse
from slimgraph.axes import DATA, Atom, Concat, Product, Term, size
from slimgraph.rules import Contraction, operator_name
from slimgraph.structure import Group, Occurrence, Origin, Site, Structure
from slimgraph.trace import module_path

__all__ = ["Group", "Occurrence", "Origin", "Site", "Structure", "infer", "plain"]


def infer(graph_module: fx.GraphModule) -> Structure:
    """Find groups, sites and layers.

    Args:
        graph_module: as made by `slimgraph.trace.trace`; not changed.

    Returns:
        Everything inferred. What is not understood is in it as a frozen group with a reason, or a refusal.

    Raises:
        GraphError: a rule contradicts the shapes in the graph.
    """
    return _Builder(analyse(graph_module)).build()


def _leaves(term: Term, place: tuple[int, ...] = ()) -> Iterator[tuple[Atom, tuple[int, ...]]]:
    match term:
        case Atom():
            yield term, place
        case Product(children) | Concat(children):
            for i, child in enumerate(children):
                yield from _leaves(child, (*place, i))


@dataclass(frozen=True)
class _Projection:
    """A contraction of an activation with a parameter, in any of its spellings."""

    contraction: Contraction
    reads: fx.Node
    parameter: str
    in_dim: int
    out_dim: int | None
    stacked: bool


class _Builder:
    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.axes = analysis.axes
        self.sources = {name: tuple(self.axes.find(t) for t in dims) for name, dims in analysis.sources.items()}
        self.layers: dict[str, int] = {}
        self.order = {n: i for i, n in enumerate(analysis.graph_module.graph.nodes)}
        self.projections = [p for c in analysis.contractions if (p := self._projection(c)) is not None]
        self.projecting = {p.contraction.node for p in self.projections}

    def build(self) -> Structure:
        places = self._places()
        residual = self._residual_atoms()
        self.layers = self._find_layers(residual)
        heads = {a for t in self.analysis.heads for a in self.axes.atoms(t) if a.frozen is None}
        left_alone = residual | self._head_widths()
        found = [s for p in self.projections if (s := self._site_atoms(p, left_alone, heads)) is not None]
        names = self._names(places, found)
        statistics, least = self._statistics(), self._least()
        experts = {a for term in self.analysis.ranges.values() for a in self.axes.atoms(term)}
        site_atoms = {a for _, atoms in found for a in atoms}
        groups = {
            names[atom]: Group(
                name=names[atom],
                units=atom.size,
                kind=_kind(atom, residual, heads, experts, site_atoms),
                layer=self._layer_of_group(atom, occurrences, residual),
                frozen=atom.frozen,
                occurrences=tuple(occurrences),
                statistics=tuple(statistics.get(atom, ())),
                at_least=least.get(atom, 1),
            )
            for atom, occurrences in places.items()
        }
        biases = self._refit_biases([p for p, _ in found])
        sites = [
            self._site(p, atoms, names, heads, residual, bias) for (p, atoms), bias in zip(found, biases, strict=True)
        ]
        readers = {str(n.target): 0 for n in self.analysis.graph_module.graph.nodes if n.op == "get_attr"}
        for n in self.analysis.graph_module.graph.nodes:
            if n.op == "get_attr":
                readers[str(n.target)] += len(n.users)
        return Structure(
            groups=groups,
            sites=sites,
            layers=list(self.layers),
            refusals=self.analysis.refusals,
            analysis=self.analysis,
            tied={k: v for k, v in readers.items() if v > 1},
            atom_groups=names,
        )

    # -- layers ---------------------------------------------------------------------------------------------------

    def _find_layers(self, residual: set[Atom]) -> dict[str, int]:
        """Numbered modules that work on the residual stream, in graph order; without a stream, all numbered ones."""
        layers: dict[str, int] = {}
        for node in self.analysis.graph_module.graph.nodes:
            path = _numbered(module_path(node))
            near = (node, *node.all_input_nodes)
            if path is not None and (not residual or any(self._along(n) in residual for n in near)):
                layers.setdefault(path, len(layers))
        return layers

    def _along(self, node: fx.Node) -> Term | None:
        """The last dimension of an activation."""
        dims = self.analysis.dims.get(node)
        if node not in self.analysis.moving or not isinstance(dims, tuple) or not dims:
            return None
        return self.axes.find(dims[-1])

    def _layer_of_path(self, path: str) -> int | None:
        layer = _numbered(path)
        return None if layer is None else self.layers.get(layer)

    def _layer_of_group(self, atom: Atom, occurrences: list[Occurrence], residual: set[Atom]) -> int | None:
        if atom in residual:
            return None
        layers = {self._layer_of_path(o.source) for o in occurrences}
        return layers.pop() if len(layers) == 1 else None

    # -- places ---------------------------------------------------------------------------------------------------

    def _places(self) -> dict[Atom, list[Occurrence]]:
        places: dict[Atom, list[Occurrence]] = {}
        for name, dims in self.sources.items():
            for dim, term in enumerate(dims):
                for atom, place in _leaves(term):
                    if atom.size > 1 and atom.frozen != DATA:
                        places.setdefault(atom, []).append(Occurrence(name, dim, place))
        return places

    def _statistics(self) -> dict[Atom, list[str]]:
        taken: dict[Atom, list[str]] = {}
        for node, term in self.analysis.statistics:
            for atom in self.axes.atoms(term):
                taken.setdefault(atom, []).append(node.name)
        for choice in self.analysis.choices:
            for atom in self.axes.atoms(choice.term):
                taken.setdefault(atom, []).append(choice.node.name)
        return taken

    def _least(self) -> dict[Atom, int]:
        least: dict[Atom, int] = {}
        for choice in self.analysis.choices:
            for atom in self.axes.atoms(choice.term):
                least[atom] = max(least.get(atom, 1), choice.at_least)
        return least

    # -- projections and sites ------------------------------------------------------------------------------------

    def _head_widths(self) -> set[Atom]:
        """What products of two activations put out. Of a single head nothing else goes into the output projection."""
        products = [c for c in self.analysis.contractions if {c.left, c.right} <= self.analysis.moving]
        put_out = (self.analysis.terms(c.node) for c in products if self._projection(c) is None)
        return {atom for dims in put_out if isinstance(dims, tuple) for atom in self.axes.atoms(dims[-1])}

    def _projection(self, c: Contraction) -> _Projection | None:
        """The weight of a contraction, on whichever side it is; None for a product of two activations."""
        for weight, dim, other in ((c.right, c.right_dim, c.left), (c.left, c.left_dim, c.right)):
            found = _parameter_behind(weight, dim)
            if found is None or other not in self.analysis.moving:
                continue
            name, in_dim, picked = found
            rank = len(self.sources[name])
            rest = [d for d in range(rank) if d != in_dim and d != picked]
            return _Projection(c, other, name, in_dim, rest[0] if len(rest) == 1 else None, picked is not None)
        return None

    def _residual_atoms(self) -> set[Atom]:
        """The residual stream: what projections write, skip connections carry past them, and projections read again."""
        written = {self._output(p) for p in self.projections}
        read = {self.axes.find(p.contraction.term) for p in self.projections}
        carried = set()
        for node in self.analysis.graph_module.graph.nodes:
            if operator_name(node).startswith("aten.add.") and self._is_skip(node):
                carried.add(self.analysis.terms(node)[-1])
        return {a for a in carried & written & read if isinstance(a, Atom)}

    def _is_skip(self, node: fx.Node) -> bool:
        """Whether a sum adds a value to something that projections computed from that value."""
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in self.analysis.moving]
        if len(operands) != 2 or not self.analysis.terms(node):
            return False
        early, late = sorted(operands, key=self.order.__getitem__)
        start = (late, late in self.projecting)
        seen, queue = {start}, [start]
        while queue:
            at, projected = queue.pop()
            for source in at.all_input_nodes:
                if source is early and projected:
                    return True
                step = (source, projected or source in self.projecting)
                # Nothing that comes before the earlier operand can lead back to it.
                if step not in seen and self.order[source] > self.order[early]:
                    seen.add(step)
                    queue.append(step)
        return False

    def _output(self, p: _Projection) -> Term | None:
        return None if p.out_dim is None else self.sources[p.parameter][p.out_dim]

    def _refit_biases(self, projections: list[_Projection]) -> list[str]:
        """The bias that a refit gives each: the one it has, else one beside the weight under a name that is free."""
        taken, found = set(self.sources), []
        for p in projections:
            owner = p.parameter.rpartition(".")[0]
            free = (name for name in _bias_names(owner, p.parameter) if name not in taken)
            found.append(_bias(p.contraction.node) or next(free))
            taken.add(found[-1])
        return found

    def _reads_rows(self, p: _Projection) -> bool:
        """Whether channels come last in what it reads and in what it puts out, as in `rows @ weight`."""
        c = p.contraction
        dim = c.left_dim if p.reads is c.left else c.right_dim
        read, made = self.analysis.terms(p.reads), self.analysis.terms(c.node)
        return dim == len(read) - 1 and bool(made) and made[-1] == self._output(p)

    def _site_atoms(
        self, p: _Projection, left_alone: set[Atom], heads: set[Atom]
    ) -> tuple[_Projection, tuple[Atom, ...]] | None:
        """The atoms whose units are removed at a projection: its heads if it has any, else its only atom."""
        if p.out_dim is None:
            return None
        term = self.axes.find(p.contraction.term)
        if isinstance(term, Atom):
            return (p, (term,)) if term not in left_alone and term.frozen is None else None
        if not isinstance(term, Product):
            return None
        outer = tuple(f for f in term.factors if isinstance(f, Atom) and f in heads)
        return (p, outer) if outer and len(outer) <= 2 and outer == term.factors[: len(outer)] else None

    def _site(
        self,
        p: _Projection,
        atoms: tuple[Atom, ...],
        names: dict[Atom, str],
        heads: set[Atom],
        residual: set[Atom],
        refit_bias: str,
    ) -> Site:
        assert p.out_dim is not None
        node = p.contraction.node
        term = self.axes.find(p.contraction.term)
        out = self._output(p)
        return Site(
            name=f"{p.parameter}[{p.in_dim}]",
            kind="heads" if atoms[0] in heads else "channels",
            layer=self._layer_of_path(module_path(node) or p.parameter),
            node=node.name,
            reads=p.reads.name,
            parameter=p.parameter,
            in_dim=p.in_dim,
            out_dim=p.out_dim,
            bias=_bias(node),
            refit_bias=refit_bias,
            channels=size(term),
            structure=plain(term),
            groups=tuple(names[a] for a in atoms),
            origins=tuple(self._origins(atoms)),
            writes_residual=isinstance(out, Atom) and out in residual,
            stacked=p.stacked,
            rows=self._reads_rows(p),
        )

    def _origins(self, atoms: tuple[Atom, ...]) -> Iterator[Origin]:
        """The projections whose output holds any of the atoms, in graph order."""
        for i in sorted({i for a in atoms for i in self._producers.get(a, ())}):
            q = self.projections[i]
            assert q.out_dim is not None
            yield Origin(q.parameter, q.out_dim, q.in_dim, q.contraction.node.name, q.reads.name)

    @cached_property
    def _producers(self) -> dict[Atom, list[int]]:
        """Indices of the projections by the atoms of their output: looked up, the time grows with depth only once."""
        found: dict[Atom, list[int]] = {}
        for i, p in enumerate(self.projections):
            out = self._output(p)
            for atom in () if out is None else set(self.axes.atoms(out)):
                found.setdefault(atom, []).append(i)
        return found

    # -- names ----------------------------------------------------------------------------------------------------

    def _names(
        self, places: dict[Atom, list[Occurrence]], found: list[tuple[_Projection, tuple[Atom, ...]]]
    ) -> dict[Atom, str]:
        """A group is called after its site, else after the first place where it occurs."""
        names: dict[Atom, str] = {}
        for p, atoms in found:
            for o_atom in atoms:
                place = next(o for o in places[o_atom] if (o.source, o.dim) == (p.parameter, p.in_dim))
                names.setdefault(o_atom, _label(place))
        for atom, occurrences in places.items():
            names.setdefault(atom, _label(occurrences[0]))
        return names


def _kind(atom: Atom, residual: set[Atom], heads: set[Atom], experts: set[Atom], site_atoms: set[Atom]) -> str:
    if atom in residual:
        return "residual"
    if atom in heads:
        return "heads"
    if atom in experts:
        return "experts"
    return "channels" if atom in site_atoms else "inner"


def _numbered(path: str) -> str | None:
    """Layers are repeated under a number; the outermost number in a module path is the layer's."""
    match = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", path)
    return None if match is None else match[1]


def _label(o: Occurrence) -> str:
    return f"{o.source}[{o.dim}]" + "".join(f".{i}" for i in o.place)


def plain(term: Term) -> str:
    """A term by its sizes alone: `3 × (5 | 5)`."""
    match term:
        case Atom():
            return str(term.size)
        case Product(factors):
            return " × ".join(f"({plain(f)})" if isinstance(f, Concat) else plain(f) for f in factors)
        case Concat(parts):
            return " | ".join(plain(p) for p in parts)


def _parameter_behind(node: fx.Node, dim: int) -> tuple[str, int, int | None] | None:
    """Follow casts, transposes and the picking of experts back to a parameter.

    Returns:
        Parameter, its dimension that corresponds to `dim`, and the dimension that an index picks from or None; None
        when something else lies between.
    """
    picked: int | None = None
    while node.op != "get_attr":
        name = operator_name(node).removeprefix("aten.").partition(".")[0]
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        order = _order(node, name)
        if name == "index" and picked is None:
            indices = node.args[1]
            assert isinstance(indices, (list, tuple))
            given = [i for i, ids in enumerate(indices) if isinstance(ids, fx.Node)]
            if len(given) != 1 or dim == given[0] or len(source.meta["val"].shape) != len(node.meta["val"].shape):
                return None
            picked = given[0]
        elif order is not None:
            dim, picked = order[dim], None if picked is None else order[picked]
        elif name not in ("to", "_to_copy", "clone", "contiguous", "detach", "alias"):
            return None
        node = source
    return str(node.target), dim, picked


def _order(node: fx.Node, name: str) -> list[int] | None:
    """For a transpose, the input dimension that each output dimension was."""
    rank = len(node.meta["val"].shape)
    order = list(range(rank))
    if name in ("t", "numpy_T", "mT"):
        order[-2:] = reversed(order[-2:])
    elif name == "transpose":
        first, second = (int(a) for a in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = order[second], order[first]
    elif name == "permute":
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        return None
    return order


def _bias_names(owner: str, parameter: str) -> Iterator[str]:
    """`a.bias` for `a.weight`, and others in case that is taken."""
    yield f"{owner}.bias" if owner else "bias"
    yield f"{parameter}_bias"
    yield from (f"{parameter}_bias_{i}" for i in itertools.count(2))


def _bias(node: fx.Node) -> str | None:
    position = {"aten.linear.default": 2, "aten.addmm.default": 0}.get(operator_name(node))
    if position is None or len(node.args) <= position:
        return None
    found = node.args[position]
    return str(found.target) if isinstance(found, fx.Node) and found.op == "get_attr" else None
