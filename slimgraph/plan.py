"""A plan: which units are kept and which layers skipped. Pure data, JSON in and out; what it does is worked out here.

A plan keeps, per group, the same units everywhere; or, *within* another group, for each of its units a list of its own
(balanced heads: every kv group keeps the same number of heads, but which ones may differ).

>>> plan = Plan({"out.weight[1]": Cut(units=6, keep=((0, 2, 5),))}, skipped=("layers.3",))
>>> Plan.from_json(plan.to_json()) == plan
True
>>> plan.to_dict()
{'out.weight[1]': {'units': 6, 'keep': [[0, 2, 5]], 'within': None}, 'layers.3': None}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimgraph.axes import Atom, Concat, Product, Term, size_with
from slimgraph.depth import skip_layers
from slimgraph.errors import PlanError
from slimgraph.groups import Structure, infer

__all__ = ["Cut", "Plan", "Resolved", "coordinates", "resolve"]


@dataclass(frozen=True)
class Cut:
    """What is kept of one group.

    Attributes:
        units: size of the group before, so that a plan for another model is noticed.
        keep: ascending unit indices that stay; one row, or one row per unit of the group `within`, all equally long.
        within: the group on whose unit the row depends, or None.
    """

    units: int
    keep: tuple[tuple[int, ...], ...]
    within: str | None = None

    @property
    def kept(self) -> int:
        """How many units stay (of each row)."""
        return len(self.keep[0])


@dataclass(frozen=True)
class Plan:
    """What is kept of every group that is cut; groups that are not named stay whole.

    Attributes:
        cuts: group -> what is kept of it.
        skipped: module paths of layers that go as a whole.
    """

    cuts: Mapping[str, Cut] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def merged(self, other: Plan) -> Plan:
        """A plan with what both cut and skip; what is cut in a layer that the other one skips is forgotten.

        Raises:
            PlanError: both cut the same group.
        """
        twice = self.cuts.keys() & other.cuts.keys()
        if twice:
            raise PlanError(f"group {min(twice)!r} is cut by both plans; a group can be cut once")
        return self._with(other.cuts, other.skipped)

    def then(self, later: Plan) -> Plan:
        """What this plan, and then one for the model that it leaves, come to in units of the model before both.

        >>> first = Plan({"out.weight[1]": Cut(units=6, keep=((0, 2, 3, 5),))})
        >>> first.then(Plan({"out.weight[1]": Cut(units=4, keep=((1, 3),))})).cuts["out.weight[1]"].keep
        ((2, 5),)

        Raises:
            PlanError: the later one was made for another number of units of a group that this one cuts, or chooses them
                within another group.
        """
        return self._with({name: self._cut_again(name, cut) for name, cut in later.cuts.items()}, later.skipped)

    def since(self, earlier: Plan) -> Plan:
        """What is left to do in the model that an earlier plan leaves; after that plan it comes to this one.

        >>> first = Plan({"out.weight[1]": Cut(units=6, keep=((0, 2, 3, 5),))})
        >>> both = Plan({"out.weight[1]": Cut(units=6, keep=((2, 5),))})
        >>> both.since(first).cuts["out.weight[1]"]
        Cut(units=4, keep=((1, 3),), within=None)

        Raises:
            PlanError: this plan keeps something that the earlier one does not.
        """
        if back := [path for path in earlier.skipped if path not in self.skipped]:
            raise PlanError(f"layer {back[0]!r} is skipped by the earlier plan and not by this one")
        for name in earlier.cuts:
            if name not in self.cuts and not _lies_in(name, self.skipped):
                raise PlanError(f"group {name!r} is cut by the earlier plan and not by this one")
        cuts = {name: self._cut_since(name, earlier) for name in self.cuts}
        skipped = tuple(path for path in self.skipped if path not in earlier.skipped)
        return Plan({name: cut for name, cut in cuts.items() if cut.kept < cut.units}, skipped)

    def _with(self, cuts: Mapping[str, Cut], skipped: Sequence[str]) -> Plan:
        mine = {name: cut for name, cut in self.cuts.items() if not _lies_in(name, skipped)}
        return Plan({**mine, **cuts}, tuple(dict.fromkeys([*self.skipped, *skipped])))

    def _cut_again(self, name: str, later: Cut) -> Cut:
        """A cut of the model that this plan leaves, in units of the model before."""
        earlier = self.cuts.get(name, Cut(later.units, (tuple(range(later.units)),)))
        if later.units != earlier.kept:
            raise PlanError(
                f"group {name!r} has {earlier.kept} units left of {earlier.units}; the later plan was made for "
                f"{later.units}"
            )
        within = earlier.within if later.within is None else later.within
        if earlier.within not in (None, within):
            raise PlanError(
                f"group {name!r} was cut within {earlier.within!r}, and now within {within!r}; expected the same "
                "group, or none"
            )
        rows = max(len(earlier.keep), len(later.keep))
        there: Sequence[int] = range(rows)  # units of `within` that the rows of the later cut are for
        if within is not None and (outer := self.cuts.get(within)):
            if outer.within is not None:
                raise PlanError(
                    f"group {name!r} cannot be cut within {within!r}, of which other units stay for each unit of "
                    f"{outer.within!r}"
                )
            rows, there = outer.units, outer.keep[0]
        place = {} if later.within is None else {unit: i for i, unit in enumerate(there)}

        def kept(row: int) -> tuple[int, ...]:
            before = earlier.keep[0 if earlier.within is None else row]
            return tuple(before[unit] for unit in later.keep[place.get(row, 0)])  # only the length of a lost row counts

        return Cut(earlier.units, tuple(map(kept, range(rows))), within)

    def _cut_since(self, name: str, earlier: Plan) -> Cut:
        """A cut in units of the model that an earlier plan leaves."""
        both = self.cuts[name]
        first = earlier.cuts.get(name, Cut(both.units, (tuple(range(both.units)),)))
        if first.units != both.units or first.within not in (None, both.within):
            raise PlanError(
                f"group {name!r} has {both.units} units, chosen within {both.within!r}; the earlier plan was made for "
                f"{first.units} within {first.within!r}"
            )
        outer = None if both.within is None else earlier.cuts.get(both.within)
        rows = []
        for row in range(len(both.keep)) if outer is None else outer.keep[0]:
            there = first.keep[0 if first.within is None else row]
            if lost := set(both.keep[row]) - set(there):
                raise PlanError(f"group {name!r} keeps unit {min(lost)}, which the earlier plan removes")
            rows.append(tuple(there.index(unit) for unit in both.keep[row]))
        if len(set(rows)) == 1:
            return Cut(first.kept, (rows[0],))
        return Cut(first.kept, tuple(rows), both.within)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: what is kept of each group, and None for each layer that is skipped."""
        cuts = {
            name: {"units": c.units, "keep": [list(r) for r in c.keep], "within": c.within}
            for name, c in self.cuts.items()
        }
        return {**cuts, **dict.fromkeys(self.skipped)}

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: the data has another form.
        """
        try:
            cuts = {str(name): _cut(c) for name, c in data.items() if c is not None}
            return cls(cuts, tuple(str(name) for name, c in data.items() if c is None))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"not a plan ({type(error).__name__}: {error}); expected "
                '{group: {"units": n, "keep": [[unit, ...]], "within": group or null}, skipped layer: null}'
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; see `from_dict` for errors."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"not a plan: not JSON ({error})") from error
        return cls.from_dict(data)


def _cut(data: Mapping[str, Any]) -> Cut:
    units, keep, within = data["units"], data["keep"], data["within"]
    if unknown := data.keys() - {"units", "keep", "within"}:
        raise ValueError(f"unknown key {min(unknown)!r}")
    if type(keep) is not list or not all(type(row) is list for row in keep):
        raise TypeError("keep is no list of lists")
    for number in (units, *(unit for row in keep for unit in row)):
        if type(number) is not int:  # nor a bool, which is one of its kinds
            raise TypeError(f"{number!r} is no whole number")
    if not isinstance(within, str | None):
        raise TypeError(f"within is {within!r}")
    return Cut(units, tuple(map(tuple, keep)), within)


@dataclass
class Resolved:
    """A validated plan, applied to the terms of one structure.

    Attributes:
        structure: what the plan was checked against, without the layers that it skips.
        plan: the plan.
        selections: source -> dimension -> (n_kept,) int64 positions that stay; only dimensions that lose some.
    """

    structure: Structure
    plan: Plan
    selections: dict[str, dict[int, Tensor]]
    _masks: dict[Atom, Tensor]
    _outer: dict[Atom, Atom | None]

    def __post_init__(self) -> None:
        self._kept = {atom: int(mask[0].sum()) for atom, mask in self._masks.items()}

    def size_of(self, term: Term) -> int:
        """Size of a term after the cut."""
        return size_with(self.structure.analysis.axes.find(term), self._kept)

    def positions(self, term: Term) -> Tensor | None:
        """(n_kept,) int64, positions of a term that stay; None when all do."""
        return _positions(self.structure, term, self._masks, self._outer)

    def shape(self, source: str) -> tuple[int, ...]:
        """Shape of a parameter, buffer or created tensor after the cut."""
        return tuple(self.size_of(t) for t in self.structure.analysis.sources[source])

    def select(self, source: str, tensor: Tensor) -> Tensor:
        """The part of a parameter or buffer that stays; the tensor itself when all of it does."""
        for dim, positions in self.selections.get(source, {}).items():
            tensor = tensor.index_select(dim, positions.to(tensor.device))
        return tensor


def resolve(structure: Structure, plan: Plan) -> Resolved:
    """Check a plan against a structure and work out every selection.

    Raises:
        PlanError: an unknown or frozen group, a group of another size, units out of range or out of order, rows of
            unequal length, a choice that depends on a group which is not there everywhere, or a layer that cannot be
            skipped.
    """
    if plan.skipped:
        for name in plan.cuts:
            if layer := _lies_in(name, plan.skipped):
                raise PlanError(f"group {name!r} lies in {layer}, which the plan skips; expected one of the two")
        structure = infer(skip_layers(structure, plan.skipped))
    masks: dict[Atom, Tensor] = {}
    outer: dict[Atom, Atom | None] = {}
    for name, cut in plan.cuts.items():
        atom = _checked(structure, name, cut)
        masks[atom] = torch.zeros(len(cut.keep), atom.size, dtype=torch.bool)
        for row, kept in enumerate(cut.keep):
            masks[atom][row, list(kept)] = True
        outer[atom] = structure.atom(cut.within) if cut.within else None
        if cut.within:
            _check_within(structure, name, atom, cut.within)
    selections: dict[str, dict[int, Tensor]] = {}
    for source, dims in structure.analysis.sources.items():
        for dim, term in enumerate(dims):
            positions = _positions(structure, term, masks, outer)
            if positions is not None:
                selections.setdefault(source, {})[dim] = positions
    return Resolved(structure, plan, selections, masks, outer)


def _lies_in(name: str, layers: Sequence[str]) -> str | None:
    """The layer that a group lies in, by the parameter that it is called after."""
    return next((path for path in layers if name.startswith(f"{path}.")), None)


def _checked(structure: Structure, name: str, cut: Cut) -> Atom:
    group = structure.group(name)
    if group.frozen:
        raise PlanError(f"group {name!r} is frozen and cannot be cut: {group.frozen}")
    if cut.units != group.units:
        raise PlanError(f"group {name!r} has {group.units} units; the plan was made for {cut.units}")
    rows = structure.group(cut.within).units if cut.within else 1
    if len(cut.keep) != rows:
        raise PlanError(f"group {name!r}: found {len(cut.keep)} rows of units, expected {rows}")
    for row in cut.keep:
        if len(row) < group.at_least:
            raise PlanError(f"group {name!r} must keep at least {group.at_least} units; found {row}")
        if len(row) != cut.kept or not row:
            raise PlanError(f"group {name!r}: every row must keep the same number of units, at least one; found {row}")
        if list(row) != sorted(set(row)) or row[0] < 0 or row[-1] >= group.units:
            raise PlanError(f"group {name!r}: units must ascend within 0..{group.units - 1}; found {row}")
    return structure.atom(name)


def _check_within(structure: Structure, name: str, atom: Atom, within: str) -> None:
    """A choice that differs from unit to unit of another group is sound where that group is always at hand."""
    other = structure.atom(within)
    analysis = structure.analysis
    if other is atom:
        raise PlanError(f"group {name!r} cannot be cut within itself; name another group, or none")
    for where, dims in [*analysis.sources.items(), *((n.name, analysis.dims[n]) for n in analysis.dims)]:
        for terms in dims if isinstance(dims, list) else [dims or ()]:
            for term in terms:
                if _lies_inside(analysis.axes.find(term), other, atom):
                    raise PlanError(
                        f"group {name!r} cannot be cut differently for each unit of {within!r}: at {where} the latter "
                        "lies inside the former. Keep the same units for all"
                    )
            present = {a for t in terms for a in analysis.axes.atoms(t)}
            if atom in present and other not in present:
                raise PlanError(
                    f"group {name!r} cannot be cut differently for each unit of {within!r}: {where} holds the one "
                    "without the other. Keep the same units for all"
                )


def _lies_inside(term: Term, inner: Atom, outer: Atom) -> bool:
    """Whether an atom is a later factor of a product than another: it varies faster."""
    match term:
        case Atom():
            return False
        case Concat(parts):
            return any(_lies_inside(p, inner, outer) for p in parts)
        case Product(factors):
            at = {a: [i for i, f in enumerate(factors) if a in _atoms(f)] for a in (inner, outer)}
            later = bool(at[inner] and at[outer]) and max(at[inner]) > min(at[outer])
            return later or any(_lies_inside(f, inner, outer) for f in factors)


def _atoms(term: Term) -> set[Atom]:
    match term:
        case Atom():
            return {term}
        case Product(children) | Concat(children):
            return {a for child in children for a in _atoms(child)}


def _positions(
    structure: Structure, term: Term, masks: dict[Atom, Tensor], outer: dict[Atom, Atom | None]
) -> Tensor | None:
    """Positions of a term that stay; None when all do."""
    axes = structure.analysis.axes
    if not any(a in masks for a in axes.atoms(term)):
        return None
    places = coordinates(axes.find(term))
    n = len(next(iter(places.values()))[0])
    stays = torch.ones(n, dtype=torch.bool)
    for atom, mask in masks.items():
        for at in places.get(atom, []):
            row = torch.zeros(n, dtype=torch.long)
            depends = outer[atom]
            if depends is not None:
                row = torch.stack(places[depends]).amax(0) if depends in places else row - 1
                if bool(((at >= 0) & (row < 0)).any()):
                    raise PlanError(
                        f"group {structure.atom_groups.get(atom)!r} cannot be cut differently for each unit of "
                        f"{structure.atom_groups.get(depends)!r}: {axes.show(term)} holds the one without the other. "
                        "Keep the same units for all"
                    )
                row = row.clamp(min=0)
            stays &= (at < 0) | mask[row, at.clamp(min=0)]
    return stays.nonzero().flatten()


def coordinates(term: Term) -> dict[Atom, list[Tensor]]:
    """For every atom in a term, each time it occurs: (n,) int64, its position at each position of the term, or -1.

    >>> a, b = Atom(2, "a"), Atom(3, "b")
    >>> [c.tolist() for c in coordinates(Product((a, b)))[a]]
    [[0, 0, 0, 1, 1, 1]]
    >>> [c.tolist() for c in coordinates(Concat((a, b)))[b]]
    [[-1, -1, 0, 1, 2]]
    """
    found: dict[Atom, list[Tensor]] = {}
    match term:
        case Atom():
            found[term] = [torch.arange(term.size)]
        case Product(factors):
            inner = [coordinates(f) for f in factors]
            sizes = [len(next(iter(c.values()))[0]) for c in inner]
            for i, found_inside in enumerate(inner):
                before, after = math.prod(sizes[:i]), math.prod(sizes[i + 1 :])
                for atom, arrays in found_inside.items():
                    spread = [a.repeat_interleave(after).repeat(before) for a in arrays]
                    found.setdefault(atom, []).extend(spread)
        case Concat(parts):
            inner = [coordinates(p) for p in parts]
            sizes = [len(next(iter(c.values()))[0]) for c in inner]
            for i, found_inside in enumerate(inner):
                before, after = sum(sizes[:i]), sum(sizes[i + 1 :])
                for atom, arrays in found_inside.items():
                    padded = [torch.nn.functional.pad(a, (before, after), value=-1) for a in arrays]
                    found.setdefault(atom, []).extend(padded)
    return found
