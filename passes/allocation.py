"""How much each layer loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from slimgraph.axes import size
from slimgraph.budget import Budget, Goal, at_factor, solve
from slimgraph.depth import skip_layers
from slimgraph.errors import CalibrationError, NumericsError, PlanError, RecipeError
from slimgraph.groups import Structure
from slimgraph.passes.base import Pass, register
from slimgraph.plan import Plan
from slimgraph.state import KEY, State, structure_of
from slimgraph.sweep import layer_similarity
from slimgraph.units import HEAD_MODES, units_of

__all__ = ["CosineAllocation", "UniformAllocation"]


@dataclass(frozen=True)
class _Allocation(Pass):
    """Turns a ratio into numbers of units.

    Attributes:
        ratio: share of all parameters that goes, added biases counted: of the model as it is when the pass runs.
        unit_ratio: instead of `ratio`, the share of units that goes, averaged over the cut layers (the method's own
            ratio), as far as whole units allow: of every site at least one stays.
        heads: "kv", "balanced" or "auto": what is removed under grouped-query attention; see
            `slimgraph.units.units_of`.
        round_to: kept channels are a multiple of this, at sites that have more.
        kinds: sites that are cut: "both", "heads" or "channels".
    """

    gives: ClassVar[str | None] = "budget"

    ratio: float | None = None
    unit_ratio: float | None = None
    heads: str = "auto"
    round_to: int = 8
    kinds: str = "both"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.unit_ratio is None):
            raise RecipeError(f"{self.name}: give either ratio or unit_ratio; found {self.ratio} and {self.unit_ratio}")
        for key, share in (("ratio", self.ratio), ("unit_ratio", self.unit_ratio)):
            if share is not None and not 0 <= share < 1:
                raise RecipeError(f"{self.name}: {key} is {share:g}; expected a share, 0 <= {key} < 1")
        if self.heads not in HEAD_MODES:
            raise RecipeError(f"{self.name}: heads is {self.heads!r}; expected one of {', '.join(HEAD_MODES)}")
        if self.kinds not in ("both", "heads", "channels"):
            raise RecipeError(f"{self.name}: kinds is {self.kinds!r}; expected both, heads or channels")
        if self.round_to < 1:
            raise RecipeError(f"{self.name}: round_to is {self.round_to}; expected at least 1")

    def run(self, graph_module: fx.GraphModule, state: State) -> fx.GraphModule | None:
        """Solve for the unit counts and record them; a graph without the layers that go as a whole, if any do."""
        structure = structure_of(graph_module)
        if state.pending is not None:
            raise PlanError(
                f"{self.name}: no sweep has carried out yet what {state.pending} shared out; expected one allocation "
                "before each sweep: put a sweep between them, or leave one out"
            )
        if state.plan.skipped:
            raise PlanError(
                f"{self.name}: an earlier pass skips {state.plan.skipped[0]}; expected all layers, as what is said of "
                "them goes by their numbers: save the model that skips it, and prune that"
            )
        sites = structure.require_sites(self.kinds)
        state.units = [units_of(structure, s, self.heads) for s in sites]
        weights = self.weights(structure, state)
        gaining = [s for s in sites if state.fit_adds_bias and s.bias is None]
        added = {s.name: size(structure.analysis.sources[s.parameter][s.out_dim]) for s in gaining}
        now = {name: p.numel() for name, p in graph_module.named_parameters()}  # an earlier pass may have cut
        goal = Goal(structure, state.units, weights, {**state.sizes, **now}, added, self.round_to)
        with state.watch("allocation"):
            state.budget = self.budget(goal, structure, state)
        state.pending = self.name
        skipped = state.budget.skipped
        if not skipped:
            return None
        state.units = [u for u in state.units if u.site.layer is None or structure.layers[u.site.layer] not in skipped]
        state.plan = state.plan.merged(Plan(skipped=skipped))
        shorter = skip_layers(structure, skipped)
        shorter.meta.update({**graph_module.meta, KEY: state})
        return shorter

    def budget(self, goal: Goal, structure: Structure, state: State) -> Budget:
        """How many units stay at each site."""
        return at_factor(goal, self.unit_ratio or 0.0) if self.ratio is None else solve(goal, self.ratio)

    def weights(self, structure: Structure, state: State) -> Mapping[int, float]:
        """Layer -> how strongly it is cut relative to the others."""
        raise NotImplementedError


@register
@dataclass(frozen=True)
class UniformAllocation(_Allocation):
    """Every layer loses the same share.

    Attributes:
        spare_first: share of the layers that stay whole at the beginning, rounded; LLM-Pruner spares 4 of 32.
        spare_last: the same at the end, where LLM-Pruner spares 2 of 32.
    """

    spare_first: float = 0.0
    spare_last: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.spare_first, self.spare_last) < 0 or self.spare_first + self.spare_last >= 1:
            raise RecipeError(
                f"{self.name}: spare_first is {self.spare_first} and spare_last {self.spare_last}; expected shares of "
                "the layers, together below 1"
            )

    def weights(self, structure: Structure, state: State) -> Mapping[int, float]:
        layers = _cut_layers(structure, state)
        first, last = (round(share * len(layers)) for share in (self.spare_first, self.spare_last))
        if first + last >= len(layers):
            raise PlanError(
                f"{self.name}: spare_first {self.spare_first:g} and spare_last {self.spare_last:g} come to {first} and "
                f"{last} of {len(layers)} layers; expected some that are left to cut: spare fewer"
            )
        return dict.fromkeys(layers[first : len(layers) - last], 1.0)


@register
@dataclass(frozen=True)
class CosineAllocation(_Allocation):
    """Layers that change their input least lose most (SlimLLM, section 3.5).

    Only the `layers` layers with the highest cosine similarity s between input and output are cut; their shares are in
    proportion to softmax(alpha · s).

    Attributes:
        alpha: sharpness of the softmax. By default 10 at a fifth of the parameters, 7 at a half and in proportion
            between and beyond, the published settings.
        layers: number of layers that are cut. By default 26 of 32 at a fifth, 30 of 32 at a half, likewise.
    """

    alpha: float | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise RecipeError(f"{self.name}: alpha is {self.alpha}; expected a finite number")

    def weights(self, structure: Structure, state: State) -> Mapping[int, float]:
        if not state.batches:
            raise CalibrationError("cosine_allocation needs calibration tokens; found none in the state")
        if state.similarity is None or state.plan.cuts:  # a run that goes on has it already, of the same dense model
            with state.watch("similarity"):
                state.similarity = layer_similarity(
                    structure, state.batches, weights=state.weights, combine=state.combine, progress=state.progress
                )
        _check_finite(structure, state.similarity)
        candidates = _cut_layers(structure, state)
        # 0 at the published setting for a fifth of the parameters, 1 at that for a half.
        ratio = self.ratio if self.ratio is not None else 0.8 * (self.unit_ratio or 0.0)
        place = (ratio - 0.2) / 0.3
        alpha = self.alpha if self.alpha is not None else max(0.0, 10 - 3 * place)
        share = min(1.0, max(0.5, (26 + 4 * place) / 32))
        count = self.layers if self.layers is not None else max(1, round(share * len(candidates)))
        if not 1 <= count <= len(candidates):
            raise PlanError(
                f"cosine_allocation: layers is {count}; expected 1 to {len(candidates)}, the layers with sites"
            )
        chosen = sorted(candidates, key=lambda i: -(state.similarity or [])[i])[:count]
        softmax = torch.softmax(alpha * torch.tensor([state.similarity[i] for i in chosen], dtype=torch.float64), 0)
        return {layer: count * float(w) for layer, w in zip(chosen, softmax, strict=True)}


def _check_finite(structure: Structure, similarity: list[float]) -> None:
    for path, value in zip(structure.layers, similarity, strict=True):
        if not math.isfinite(value):
            raise NumericsError(
                f"the activations of layer {path} hold NaN or infinity: the cosine similarity of input and output is "
                f"{value}, expected a number; check the weights, and run in float32 or bfloat16 where float16 overflows"
            )


def _cut_layers(structure: Structure, state: State) -> list[int]:
    return sorted({u.site.layer for u in state.units if u.site.layer is not None})
