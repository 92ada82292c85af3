"""The passes that change the graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from slimgraph.errors import PlanError
from slimgraph.evidence import Evidence, Twin
from slimgraph.groups import Structure
from slimgraph.passes.base import Pass, check_dtype, dtype_for, register
from slimgraph.plan import Plan, resolve
from slimgraph.state import KEY, State, structure_of
from slimgraph.surgery import Refit, prune_graph
from slimgraph.sweep import Decision, sweep
from slimgraph.units import Units

__all__ = ["ApplyPlan", "Sweep"]


@register
@dataclass(frozen=True)
class Sweep(Pass):
    """Score, remove and refit at every site in one go over the model.

    Needs what the passes before it recorded: how units are chosen, how many stay, and how to refit. Each site is
    decided with the activations that the sites before it, already pruned, produce (SlimLLM, section 3.1).

    Attributes:
        dtype: in which a float32 model's products are taken on the way, if the device is faster in it: "bfloat16", or
            None for its own. Statistics are added up and fits are solved as precisely in any case.
    """

    gives: ClassVar[str | None] = "cut"
    needs: ClassVar[tuple[str, ...]] = ("budget", "fit", "choice")

    dtype: str | None = None

    def __post_init__(self) -> None:
        check_dtype(self.name, self.dtype)

    def run(self, graph_module: fx.GraphModule, state: State) -> fx.GraphModule:
        """Decide at every site, then cut graph and weights."""
        budget, fit = state.budget, state.fit
        if budget is None:
            raise PlanError("sweep needs numbers of units: put an allocation pass before it, like uniform_allocation")
        if fit is None:
            raise PlanError("sweep needs a fit: put a recovery pass before it, like regression or no_recovery")
        missing = {u.site.kind for u in state.units} - state.importance.keys()
        if missing:
            raise PlanError(f"sweep does not know how to choose {min(missing)}: put an importance pass before it")
        structure = structure_of(graph_module)

        cut = [_current(u, structure) for u in state.units if budget.keep[u.site.name] < u.block_size]
        # Where no output is simply added to the stream, nothing can be learnt from the dense model's stream.
        beside = state.twin == "dense" or (state.twin == "stream" and any(structure.joined(u.site) for u in cut))

        def decide(units: Units, evidence: Evidence) -> Decision | None:
            if state.twin and not beside:
                evidence = replace(evidence, twin=Twin(evidence.inputs))
            with state.watch("scores"):
                importance = state.importance[evidence.kind]
                kept = importance.select(evidence, budget.keep[units.site.name])
                scores = state.scores
                if scores is not None and units.site.name not in scores and hasattr(importance, "scores"):
                    scores[units.site.name] = importance.scores(evidence).cpu()
            with state.watch("solves"):
                channels = evidence.kept_channels(kept)
                return Decision(kept, channels, Refit(*fit(evidence, channels)))

        sink = state.sink
        earlier = {} if sink is None else sink.earlier
        if sink is not None:
            sink.measured(state.similarity)
        dtype = dtype_for(self.dtype, state)
        with state.watch("sweep"):
            decisions = {**earlier} | sweep(
                structure,
                state.batches,
                [u for u in cut if u.site.name not in earlier],
                decide,
                weights=state.weights,
                combine=state.combine,
                watch=state.watch,
                progress=state.progress,
                remember=None if sink is None else sink.decided,
                layer_done=None if sink is None else sink.layer_done,
                start=None if sink is None else sink.start,
                twin=beside,
                dtype=dtype,
            )
        plan = Plan({})
        for u in cut:
            plan = plan.merged(Plan(u.cut(decisions[u.site.name].units.cpu())))
        refits = {name: d.refit for name, d in decisions.items()}
        state.pending = None
        return _cut(graph_module, state, structure_of(graph_module), plan, refits)


@register
@dataclass(frozen=True)
class ApplyPlan(Pass):
    """Cut by a plan that is already made, without scores, statistics or refits.

    Attributes:
        plan: group -> {"units", "keep", "within"}, and layer -> null for each that is skipped, as in a saved plan.
    """

    gives: ClassVar[str | None] = ""

    plan: dict[str, Any]

    def run(self, graph_module: fx.GraphModule, state: State) -> fx.GraphModule:
        """Cut graph and weights."""
        return _cut(graph_module, state, structure_of(graph_module), Plan.from_dict(self.plan), {})


def _current(units: Units, structure: Structure) -> Units:
    """The same units where the site is now: a pass of others may have changed the graph since they were allocated."""
    found = next((s for s in structure.sites if s.name == units.site.name), None)
    if found is None or (found.groups, found.channels) != (units.site.groups, units.site.channels):
        raise PlanError(f"site {units.site.name} is not what it was when units were allocated; allocate again after")
    return replace(units, site=found)


def _cut(
    graph_module: fx.GraphModule, state: State, structure: Any, plan: Plan, refits: dict[str, Refit]
) -> fx.GraphModule:
    if state.sink is not None and state.plan.cuts:
        raise PlanError(
            "a streamed model can be cut by one pass only: its weights are written as soon as they are cut. Leave the "
            "other cutting passes out, or prune in memory"
        )
    if state.sink is not None and plan.skipped:
        raise PlanError(f"a streamed model cannot skip layers; found {plan.skipped[0]} in the plan: prune in memory")
    with state.watch("surgery"), torch.no_grad():
        pruned = prune_graph(resolve(structure, plan), refits, stand_in=state.sink.stand_in if state.sink else None)
    state.plan = state.plan.then(plan)
    state.refits.update(refits)
    pruned.meta.update({**graph_module.meta, KEY: state})
    return pruned
