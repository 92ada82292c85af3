"""What can be removed at a site: its units, and the blocks that must keep equally many of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.axes import Term, size_with
from slimgraph.errors import PlanError
from slimgraph.groups import Origin, Site, Structure
from slimgraph.plan import Cut, coordinates

__all__ = ["HEAD_MODES", "Units", "origin_units", "parameter_count", "units_of"]

HEAD_MODES = ("auto", "kv", "balanced")


@dataclass(frozen=True)
class Units:
    """The units of one site.

    Attributes:
        site: the site.
        group: the group that is cut.
        within: the group whose units are the blocks, or None for a single block.
        members: (channels,) int64, the unit of each input channel of the site.
        blocks: (n_units,) int64, the block of each unit.
    """

    site: Site
    group: str
    within: str | None
    members: Tensor
    blocks: Tensor

    @property
    def block_count(self) -> int:
        """Number of blocks."""
        return int(self.blocks.max()) + 1

    @property
    def block_size(self) -> int:
        """Units in each block before the cut."""
        return len(self.blocks) // self.block_count

    def cut(self, kept: Tensor) -> dict[str, Cut]:
        """The plan entry that keeps these units.

        Args:
            kept: (n_kept,) int64 ascending unit indices, equally many in each block.
        """
        if len(kept) == len(self.blocks):
            return {}
        rows: list[list[int]] = [[] for _ in range(self.block_count)]
        for unit in kept.tolist():
            rows[unit // self.block_size].append(unit % self.block_size)
        return {self.group: Cut(self.block_size, tuple(tuple(r) for r in rows), self.within)}


def units_of(structure: Structure, site: Site, heads: str = "auto") -> Units:
    """The units of a site.

    Args:
        structure: where the site is from.
        site: the site.
        heads: for grouped-query attention, "kv" removes whole kv groups with all their heads, "balanced" removes the
            same number of heads from every kv group. "auto" is balanced where a kv group has several heads.

    Raises:
        PlanError: `heads` is none of these.
    """
    if heads not in HEAD_MODES:
        raise PlanError(f"heads is {heads!r}; expected one of {', '.join(HEAD_MODES)}")
    term = _term(structure, site.parameter, site.in_dim)
    places = coordinates(term)
    atoms = [structure.atom(g) for g in site.groups]
    first = torch.stack(places[atoms[0]]).amax(0)
    if len(atoms) == 1 or heads == "kv":
        return Units(site, site.groups[0], None, first, torch.zeros(atoms[0].size, dtype=torch.long))
    second = torch.stack(places[atoms[1]]).amax(0)
    repeats = atoms[1].size
    blocks = torch.arange(atoms[0].size).repeat_interleave(repeats)
    return Units(site, site.groups[1], site.groups[0], first * repeats + second, blocks)


def origin_units(structure: Structure, units: Units, origin: Origin) -> Tensor:
    """(rows,) int64, the unit that each output row of a producing projection belongs to, or -1."""
    places = coordinates(_term(structure, origin.parameter, origin.dim))
    atom = structure.atom(units.group)
    absent = torch.full((len(next(iter(places.values()))[0]),), -1)
    unit = torch.stack([*places.get(atom, []), absent]).amax(0)
    if units.within is None:
        return unit
    outer = torch.stack([*places.get(structure.atom(units.within), []), absent]).amax(0)
    return torch.where((unit >= 0) & (outer >= 0), outer * units.block_size + unit, -1)


def parameter_count(structure: Structure, kept: Mapping[str, int], sources: Mapping[str, int]) -> int:
    """Number of parameters when groups keep that many units.

    Args:
        structure: the groups.
        kept: group -> units kept; others stay whole.
        sources: parameter name -> number of elements before, for every parameter that counts.
    """
    axes = structure.analysis.axes
    atoms = {structure.atom(name): n for name, n in kept.items()}
    affected = {o.source for name in kept for o in structure.groups[name].occurrences} & sources.keys()

    total = sum(n for name, n in sources.items() if name not in affected)
    for name in affected:
        total += math.prod(size_with(axes.find(t), atoms) for t in structure.analysis.sources[name])
    return total


def _term(structure: Structure, source: str, dim: int) -> Term:
    return structure.analysis.axes.find(structure.analysis.sources[source][dim])
