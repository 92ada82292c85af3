"""What travels from pass to pass: the state kept in a graph module's `meta`.

Passes are callables on a graph module, so that they compose with those of other toolchains. What they need beyond the
graph (calibration tokens, what earlier passes chose) lies in `graph_module.meta["slimgraph"]`. Structure is inferred
anew from the graph by each pass that needs it: a foreign pass may have changed the graph in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, fx

from slimgraph.budget import Budget
from slimgraph.errors import PlanError
from slimgraph.evidence import Combine, Evidence, alone
from slimgraph.groups import Structure, infer
from slimgraph.plan import Plan
from slimgraph.progress import SILENT, Progress, Stopwatch
from slimgraph.surgery import Refit
from slimgraph.units import Units

if TYPE_CHECKING:
    from slimgraph.execute import Parking, Weights
    from slimgraph.sweep import Decision

__all__ = ["KEY", "Fit", "Importance", "Sink", "State", "attach", "state_of", "structure_of"]

KEY = "slimgraph"


class Importance(Protocol):
    """Chooses the units that stay at a site."""

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        """Ascending int64 indices of the units that stay, `keep` of each block."""
        ...


class Sink(Protocol):
    """Where a sweep's work goes as it is done, for models that are never in memory as a whole."""

    @property
    def earlier(self) -> Mapping[str, Decision]:
        """Site name -> what was decided there before this run began."""
        ...

    @property
    def start(self) -> tuple[int, Parking] | None:
        """Layer after which the sweep goes on, and what was parked there; None for the beginning."""
        ...

    def measured(self, similarity: list[float] | None) -> None:
        """Keep what was measured on the dense model, so that a run that goes on need not measure it again."""
        ...

    def decided(self, units: Units, decision: Decision) -> Decision:
        """Take a decision; returns one in whose place the weights need no memory."""
        ...

    def layer_done(self, layer: int, parking: Parking) -> None:
        """Every micro-batch is past the layer; what is parked can be gone on from."""
        ...

    def stand_in(self, shape: Sequence[int]) -> Tensor:
        """A parameter of that shape that needs no memory of its own."""
        ...


Fit = Callable[[Evidence, Tensor], "tuple[Tensor, Tensor | None]"]
"""Evidence and kept channels -> new weight (out, kept) and bias (out,) or None."""


@dataclass
class State:
    """What passes share.

    Attributes:
        batches: micro-batches of calibration tokens, (samples, tokens) int64 each.
        at_once: samples of a full micro-batch, for passes that add some; None for as many as the first has.
        sizes: parameter name -> number of elements, for all parameters of the whole model.
        importance: "heads" and "channels" -> how units are chosen.
        fit: how output projections are refitted; a sweep needs one.
        fit_adds_bias: whether a refitted site gains a bias.
        twin: what the fit needs the dense model beside the pruned one for, "dense" or "stream" (see
            `slimgraph.evidence.TARGETS`); None where it does not.
        units: the sites to cut, once allocated.
        budget: how many units stay, once allocated.
        pending: recipe name of the pass that allocated it, until a sweep has carried it out; None else.
        plan, refits: what the sweep decided.
        similarity: cosine similarity of input and output per layer, when it was measured.
        scores: site -> (units,) float64, what scores lowest goes first, when the site is first cut; None when they are
            not to be kept.
        watch: seconds by stage.
        progress: shows what is going on.
        weights: fetches parameters by name; the graph module's own when None.
        generate: has the dense model write samples, called as `slimgraph.generate.generate` from `like` on; None where
            it cannot.
        combine: sums statistics over processes.
        sink: takes pruned layers as they are done; None keeps them in the graph module.
        history: recipe entries of the passes that ran.
    """

    batches: Sequence[Tensor] = ()
    at_once: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    importance: dict[str, Importance] = field(default_factory=dict)
    fit: Fit | None = None
    fit_adds_bias: bool = False
    twin: str | None = None
    units: Sequence[Units] = ()
    budget: Budget | None = None
    pending: str | None = None
    plan: Plan = field(default_factory=Plan)
    refits: dict[str, Refit] = field(default_factory=dict)
    similarity: list[float] | None = None
    scores: dict[str, Tensor] | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    progress: Progress = SILENT
    weights: Weights | None = None
    generate: Callable[..., Tensor] | None = None
    combine: Combine = alone
    sink: Sink | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def attach(graph_module: fx.GraphModule, state: State) -> fx.GraphModule:
    """Put a state on a graph module, in place, before the first pass runs on it."""
    if not state.sizes:
        state.sizes = {name: p.numel() for name, p in graph_module.named_parameters()}
    graph_module.meta[KEY] = state
    return graph_module


def state_of(graph_module: fx.GraphModule) -> State:
    """The state on a graph module.

    Raises:
        PlanError: there is none.
    """
    state = graph_module.meta.get(KEY)
    if not isinstance(state, State):
        raise PlanError(
            "the graph module carries no Slimgraph state: call slimgraph.state.attach(graph_module, State(...)) first. "
            "A pass that made a new graph module has to carry its `meta` over"
        )
    return state


def structure_of(graph_module: fx.GraphModule) -> Structure:
    """Groups and sites of the graph as it is now."""
    return infer(graph_module)
