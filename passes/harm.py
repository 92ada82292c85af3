"""Every site loses what harms the model least: the allocation of Slimgraph's own method."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from slimgraph import harm
from slimgraph.budget import Budget, Goal, Skip, check_narrowest, keep_at, solve_curves
from slimgraph.cost import macs
from slimgraph.depth import skippable
from slimgraph.errors import CalibrationError, PlanError, RecipeError
from slimgraph.evidence import Evidence
from slimgraph.groups import Structure
from slimgraph.passes.allocation import _Allocation, _cut_layers
from slimgraph.passes.base import check_dtype, dtype_for, register
from slimgraph.resources import Measure, cached_numbers, per_unit, seconds
from slimgraph.state import State
from slimgraph.surgery import Refit
from slimgraph.sweep import Decision
from slimgraph.units import Units

__all__ = ["HarmAllocation"]

_RESOURCES = ("parameters", "macs", "cache", "latency")


@register
@dataclass(frozen=True)
class HarmAllocation(_Allocation):
    """Every site is cut alone to a few widths, and the budget goes where it harms the next token least.

    Heads and channels compete for the same budget. The importance and recovery passes come before: cuts are tried with
    their scores and fits. The model has to be in memory.

    Attributes:
        widths: shares of a site's units that are kept when it is tried, of few units at least one. No site gets
            narrower than the lowest.
        tokens: calibration tokens that every cut is tried on in each process, of whole samples among those that cuts
            are decided from.
        samples: calibration samples that the tried cuts are decided from in each process, rounded up to whole
            micro-batches; all others are left to the sweep. None takes all.
        power: harm is a power mean over their positions: 1 for the mean; 2, the root mean square, spares what few
            positions need much.
        together: harms are scaled, kind by kind and width by width, to add up to what all cuts do at once.
        depth: whole layers compete as well, whatever `kinds` says, at the harm that it does to skip one alone. A
            skipped layer stays in the model's list and hands on what it is given.
        spare_last_heads: share of the layers with heads, rounded, whose heads all stay: those at the end. What the
            last layer's heads copy from earlier in a text shows in few texts, and no later layer makes up for it.
        of: what `ratio` is a share of: the "parameters" of the whole model; or, for one prompt as long as the
            calibration samples, "macs", the multiply-accumulates, output projection included; "cache", the keys and
            values that it leaves in a cache, of which only whole kv groups free any (`heads: kv`); or "latency", the
            seconds of a forward pass, measured here and now.
        dtype: in which a float32 model's products are taken, if the device is faster in it: "bfloat16", or None for its
            own.
    """

    needs: ClassVar[tuple[str, ...]] = ("choice", "fit")

    widths: tuple[float, ...] = (0.25,)
    tokens: int = 1024
    samples: int | None = 32
    power: float = 1.0
    together: bool = True
    depth: bool = False
    spare_last_heads: float = 0.04
    of: str = "parameters"
    dtype: str | None = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            raise RecipeError(f"{self.name}: unit_ratio is {self.unit_ratio}; expected ratio, of all parameters")
        if not self.widths or not all(0 < w < 1 for w in self.widths):
            raise RecipeError(f"{self.name}: widths are {self.widths}; expected shares between 0 and 1")
        if self.of not in _RESOURCES:
            raise RecipeError(f"{self.name}: of is {self.of!r}; expected one of {', '.join(_RESOURCES)}")
        if self.tokens < 1:
            raise RecipeError(f"{self.name}: tokens is {self.tokens}; expected at least 1")
        if self.samples is not None and self.samples < 1:
            raise RecipeError(f"{self.name}: samples is {self.samples}; expected at least 1, or null")
        if not 0 <= self.spare_last_heads < 1:
            raise RecipeError(
                f"{self.name}: spare_last_heads is {self.spare_last_heads}; expected a share of the layers, below 1"
            )
        if not 1 <= self.power < math.inf:
            raise RecipeError(f"{self.name}: power is {self.power}; expected at least 1, and finite")
        check_dtype(self.name, self.dtype)

    def weights(self, structure: Structure, state: State) -> Mapping[int, float]:
        return dict.fromkeys(_cut_layers(structure, state), 1.0)

    def budget(self, goal: Goal, structure: Structure, state: State) -> Budget:
        self._check(state)
        spared = self._spared(structure)
        may_go = [structure.layers[i] for i in goal.weights if i not in spared]
        shorter = skippable(structure, may_go) if self.depth else {}
        widths = {u.site.name: self._widths(u, goal, spared) for u in goal.sites}
        measure = self._measure(state)
        left = None if measure is None else self._left(goal, state, measure)
        if not shorter:  # what a layer leaves of its sites' share is known with its harm only
            narrowest = {u.site.name: min(widths[u.site.name], default=u.block_size) for u in goal.sites}
            check_narrowest(goal, narrowest, self.ratio or 0.0, left)
        library = self._library(widths, structure, state, shorter)
        curves = {}
        for u in goal.sites:
            least = min(library[u.site.name], default=u.block_size)  # a single unit has to stay
            step = 1 if u.site.kind == "heads" else self.round_to
            between = {least, *range(least, u.block_size, step), u.block_size}
            curves[u.site.name] = harm.curve(library[u.site.name], u, sorted(between))
        skips = self._skips(goal, library, state, shorter, measure)
        return solve_curves(goal, curves, self.ratio or 0.0, left, skips)

    def _check(self, state: State) -> None:
        """Refuse to begin without what trial cuts need."""
        if not state.batches:
            raise CalibrationError("harm_allocation needs calibration tokens; found none in the state")
        missing = {u.site.kind for u in state.units} - state.importance.keys()
        if missing or state.fit is None:
            lacking = "a fit" if state.fit is None else f"how to choose {min(missing)}"
            raise PlanError(f"harm_allocation lacks {lacking}: put importance and recovery passes before it")
        if state.weights is not None:
            raise PlanError(
                "harm_allocation runs the model many times, and for that it has to be in memory; found weights that "
                "are fetched as needed: load the model whole, or take cosine_allocation"
            )

    def _spared(self, structure: Structure) -> set[int]:
        """Layers whose heads stay."""
        sites = structure.prunable_sites()
        layers = sorted({s.layer for s in sites if s.kind == "heads" and s.layer is not None})
        return set(layers[len(layers) - round(self.spare_last_heads * len(layers)) :])

    def _widths(self, units: Units, goal: Goal, spared: Collection[int]) -> list[int]:
        """The widths that a site is tried at; none where it stays whole."""
        layer = units.site.layer
        if layer not in goal.weights or (units.site.kind == "heads" and layer in spared):
            return []
        tried = {keep_at(units, 1 - share, self.round_to) for share in self.widths}
        return sorted(tried - {units.block_size})

    def _measure(self, state: State) -> Measure | None:
        """What a graph takes of the resource; None for parameters, which are counted anyway."""
        if self.of == "parameters":
            return None
        sample = state.batches[0][:1]
        measures: dict[str, Measure] = {
            "macs": lambda graph: macs(graph, sample.shape[1]),
            "cache": lambda graph: cached_numbers(graph, sample.shape[1]),
            "latency": lambda graph: self._agreed(seconds(graph, sample), state),
        }
        return measures[self.of]

    def _left(self, goal: Goal, state: State, measure: Measure) -> Callable[[Mapping[str, int]], float]:
        """What widths leave of the resource."""
        with state.watch("resources"):
            whole = measure(goal.structure.analysis.graph_module)
            each = per_unit(goal.structure, goal.sites, measure)
        least = min(each, key=each.__getitem__)
        if each[least] < 0:
            raise PlanError(
                f"of {self.of}: {least} takes more of it when it is cut to half than as it is; expected less: measure "
                "on a machine that does nothing else, with longer samples, or take another budget"
            )
        if not any(each.values()):
            raise PlanError(
                f"of {self.of}: no cut frees any of it; expected sites that do: of the cache only whole kv groups free "
                "some (heads: kv)"
            )
        sizes = {u.site.name: u.block_size for u in goal.sites}
        return lambda keep: whole - sum(each[name] * (sizes[name] - n) for name, n in keep.items())

    @staticmethod
    def _skips(
        goal: Goal,
        library: harm.Library,
        state: State,
        shorter: Mapping[str, fx.GraphModule],
        measure: Measure | None,
    ) -> dict[str, Skip]:
        """What it does to skip each layer that may go, given the graph without it."""
        if not shorter:
            return {}
        graph_module = goal.structure.analysis.graph_module
        found = {}
        with state.watch("resources"):
            whole = 0.0 if measure is None else measure(graph_module)
            for path, graph in shorter.items():
                gone = dict(graph_module.named_parameters()).keys() - dict(graph.named_parameters()).keys()
                parameters = sum(goal.sizes[name] for name in gone)
                saves = parameters if measure is None else whole - measure(graph)
                found[path] = Skip(goal.structure.layers.index(path), library[path][0], saves, parameters)
        return found

    @staticmethod
    def _agreed(value: float, state: State) -> float:
        """The mean over processes, which measure different times and have to decide alike."""
        total, count = state.combine(torch.tensor([value, 1.0], dtype=torch.float64))
        return float(total / count)

    def _library(
        self, widths: Mapping[str, Sequence[int]], structure: Structure, state: State, layers: Collection[str]
    ) -> harm.Library:
        fit = state.fit
        assert fit is not None

        def decide(units: Units, evidence: Evidence, keep: int) -> Decision:
            kept = state.importance[evidence.kind].select(evidence, keep)
            channels = evidence.kept_channels(kept)
            return Decision(kept, channels, Refit(*fit(evidence, channels)))

        with state.watch("harm"):
            return harm.measure(
                structure,
                self._first(state.batches),
                state.units,
                widths,
                decide,
                tokens=self.tokens,
                power=self.power,
                together=self.together,
                layers=layers,
                dtype=dtype_for(self.dtype, state),
                combine=state.combine,
                watch=state.watch,
                progress=state.progress,
            )

    def _first(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """As many micro-batches as hold the samples that cuts are decided from."""
        found: list[Tensor] = []
        for batch in batches:
            if self.samples is not None and sum(map(len, found)) >= self.samples:
                break
            found.append(batch)
        return found
