"""Why slices of parameters belong together, or why an axis is frozen: the chain of graph nodes that says so."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from slimgraph.axes import Atom, Term
from slimgraph.errors import PlanError
from slimgraph.groups import Group, Occurrence, Structure, plain
from slimgraph.rules import operator_name
from slimgraph.trace import module_path

__all__ = ["Coupling", "Explanation", "Step", "explain"]


@dataclass(frozen=True)
class Step:
    """A graph node that made two axes one, or cut one into pieces.

    Attributes:
        node: its name.
        operator: its operator.
        module: path of the module that ran it.
    """

    node: str
    operator: str
    module: str

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}{f' in {self.module}' if self.module else ''})"


@dataclass(frozen=True)
class Coupling:
    """Another place of the same group, and how the graph leads there.

    Attributes:
        occurrence: the other place.
        steps: the nodes on the shortest way there.
    """

    occurrence: Occurrence
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Explanation:
    """What one group in a parameter's dimension is coupled to.

    Attributes:
        place: what was asked for, with the place in the dimension's term.
        structure: the whole dimension as a term.
        group: the group.
        couplings: its other places.
        freezing: for a frozen group, the way to the node that froze it.
    """

    place: str
    structure: str
    group: Group
    couplings: tuple[Coupling, ...]
    freezing: tuple[Step, ...]

    def __str__(self) -> str:
        state = f"frozen: {self.group.frozen}" if self.group.frozen else "can be cut"
        lines = [f"{self.place}: {self.group.units} units ({self.group.kind}) of [{self.structure}]; {state}"]
        if self.freezing:
            lines.append(f"  frozen by way of {' -> '.join(map(str, self.freezing))}")
        for coupling in self.couplings:
            o = coupling.occurrence
            where = f"{o.source}[{o.dim}]" + "".join(f".{i}" for i in o.place)
            way = " -> ".join(map(str, coupling.steps)) or "the same parameter"
            lines.append(f"  {where}\n    by {way}")
        return "\n".join(lines)


def explain(structure: Structure, what: str) -> list[Explanation]:
    """Explain a dimension of a parameter.

    Args:
        structure: the groups.
        what: a parameter's name with a dimension, like `decoder.0.out.weight[1]`; `.0`, `.1` ... after it pick a factor
            or a part.

    Returns:
        One explanation per group in the dimension (or in the part of it that was picked).

    Raises:
        PlanError: there is no such parameter or dimension.
    """
    source, dim, place = _parse(structure, what)
    analysis = structure.analysis
    term = analysis.axes.find(analysis.sources[source][dim])
    steps_between = _Ways(structure)
    explanations = []
    for group in structure.groups.values():
        mine = [o for o in group.occurrences if (o.source, o.dim) == (source, dim) and o.place[: len(place)] == place]
        if not mine:
            continue
        start = analysis.sources[source][dim]
        others = [o for o in group.occurrences if (o.source, o.dim) != (source, dim)]
        couplings = tuple(
            Coupling(o, steps_between(start, _is_within(analysis.sources[o.source][o.dim]))) for o in others
        )
        frozen_atoms = dict(analysis.axes.freezes)
        freezing = steps_between(start, frozen_atoms.__contains__) if group.frozen else ()
        label = f"{source}[{dim}]" + "".join(f".{i}" for i in mine[0].place)
        explanations.append(Explanation(label, plain(term), group, couplings, freezing))
    return explanations


def _parse(structure: Structure, what: str) -> tuple[str, int, tuple[int, ...]]:
    match = re.fullmatch(r"(.+)\[(\d+)\]((?:\.\d+)*)", what)
    if match is None:
        raise PlanError(f"{what!r} names no dimension; write PARAMETER[DIMENSION], like {_example(structure)}")
    source, dim = match[1], int(match[2])
    dims = structure.analysis.sources.get(source)
    if dims is None:
        raise PlanError(f"no parameter is called {source!r}; write one like {_example(structure)}")
    if dim >= len(dims):
        raise PlanError(f"{source} has {len(dims)} dimensions; found [{dim}], expected at most [{len(dims) - 1}]")
    return source, dim, tuple(int(i) for i in match[3].split(".")[1:])


def _example(structure: Structure) -> str:
    return structure.sites[0].name if structure.sites else f"{next(iter(structure.analysis.sources))}[0]"


def _is_within(term: Term) -> Callable[[Atom], bool]:
    return lambda atom: atom is term


class _Ways:
    """Shortest ways between atoms along merges and splits."""

    def __init__(self, structure: Structure) -> None:
        self.nodes = {n.name: n for n in structure.analysis.graph_module.graph.nodes}
        self.neighbours: dict[Atom, list[tuple[Atom, str]]] = {}
        for link in structure.analysis.axes.links:
            self.neighbours.setdefault(link.first, []).append((link.second, link.cause))
            self.neighbours.setdefault(link.second, []).append((link.first, link.cause))

    def __call__(self, start: Term, found: Callable[[Atom], bool]) -> tuple[Step, ...]:
        if not isinstance(start, Atom):
            return ()
        came: dict[Atom, tuple[Atom, str] | None] = {start: None}
        queue = deque([start])
        while queue:
            atom = queue.popleft()
            if found(atom):
                return self._steps(atom, came)
            for other, cause in self.neighbours.get(atom, ()):
                if other not in came:
                    came[other] = (atom, cause)
                    queue.append(other)
        return ()

    def _steps(self, atom: Atom, came: dict[Atom, tuple[Atom, str] | None]) -> tuple[Step, ...]:
        causes: list[str] = []
        step = came[atom]
        while step is not None:
            before, cause = step
            if not causes or causes[-1] != cause:
                causes.append(cause)
            step = came[before]
        return tuple(self._step(self.nodes[c]) for c in reversed(causes) if c in self.nodes)

    @staticmethod
    def _step(node: fx.Node) -> Step:
        return Step(node.name, operator_name(node), module_path(node))
