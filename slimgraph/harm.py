"""What cutting one site does to the whole model: a library of (site, units kept) -> harm.

Every site is cut alone, to a few widths, with the scores and the fit that the sweep will use; everything else stays
dense. Harm is how far the distribution of the next token moves. A budget can then be shared out among all sites, heads
and channels alike, by what their units are worth.

A few calibration tokens stand for all text. What a site does for kinds of text that are not among them may show as a
large harm at few positions: a mean over positions of a higher power counts these more, and spares the first layers,
which make sense of rare tokens.

Harms do not add up. What one layer's heads fetch another's can fetch as well, so that all of them cut down do more harm
than the sum of the single cuts; the damage of many layers' channels, on the other hand, is much of it the same damage.
All sites of a kind are therefore cut together as well, and their harms scaled to that.

Depth is one more level: a layer may be skipped, at the harm that this alone does.

The dense model is run once over the samples that the cuts are decided from. Then the first few samples go
through it again, and from the beginning of each layer on to the logits with every cut of the layer's sites, at a lower
precision if that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import CalibrationError, NumericsError
from slimgraph.evidence import Combine, Evidence, Twin, alone
from slimgraph.execute import Observer, Parking, Stop, feeds_products, lower, run
from slimgraph.groups import Structure
from slimgraph.moments import Norms, row_slices
from slimgraph.progress import SILENT, Progress, Stopwatch
from slimgraph.sweep import Decision, Projection, evidence_at, norm_observers, projection
from slimgraph.trace import is_static, tensor_at
from slimgraph.units import Units

__all__ = ["Library", "curve", "measure"]

Library = Mapping[str, Mapping[int, float]]
"""Site name -> units kept per block -> harm, a mean of KL divergences from the dense model, in nats.

A layer's module path stands beside the names of sites if it was tried without the layer, under 0.
"""

_STRIDE = 4  # every so many positions the logits are looked at
_SAME_SHAPE = {  # what models put between the last product and the logits, element by element
    torch.ops.aten.clone.default,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.tanh.default,
    torch.ops.aten.to.dtype,
    torch.ops.aten._to_copy.default,
}


def measure(
    structure: Structure,
    batches: Sequence[Tensor],
    units: Sequence[Units],
    widths: Mapping[str, Sequence[int]],
    decide: Callable[[Units, Evidence, int], Decision],
    *,
    tokens: int = 1024,
    power: float = 1.0,
    together: bool = True,
    layers: Collection[str] = (),
    dtype: torch.dtype | None = None,
    combine: Combine = alone,
    watch: Stopwatch | None = None,
    progress: Progress | None = None,
) -> Library:
    """Cut every site alone to every width, and see what becomes of the next token's distribution.

    Args:
        structure: groups, sites and layers of a model that is in memory.
        batches: micro-batches of calibration tokens, (samples, tokens) int64 each: what cuts are decided from.
        units: the sites.
        widths: site name -> units kept in each block.
        decide: units, evidence of the dense model and units kept per block -> what to cut.
        tokens: number of tokens, of whole samples, that go to the logits with every cut; the divergence is taken at
            every fourth position. A graph that works for one shape only is given its first micro-batch.
        power: harm is the power mean of the positions' divergences: 1 for the mean, 2 for the root mean square.
        together: whether harms are scaled, by one factor for all sites of a kind at their narrowest width, one for the
            next width, and so on, to add up to what all these cuts do at once.
        layers: module paths of layers that are skipped as a whole, each alone; their harms are not scaled.
        dtype: in which products are taken, the model's own by default; see `execute.lower`. A copy of the weights is
            held in it, and of the new output projections of all cuts.
        combine: sums over processes.
        watch: collects the seconds that statistics take.
        progress: shows how far it got.

    Raises:
        CalibrationError: no calibration tokens.
        GraphError: the graph shows no layers.
        NumericsError: what the dense model or one with a cut predicts is not finite.
    """
    if not batches or not sum(b.numel() for b in batches):
        raise CalibrationError("no calibration tokens; expected at least one sequence")
    graph_module = structure.analysis.graph_module
    boundaries = structure.boundaries()
    starts = [boundaries[0][0], *(after for _, after in boundaries[:-1])]
    cuts = _decided(structure, batches, units, widths, decide, dtype, combine, watch or Stopwatch(), progress)
    wanted = max(1, tokens // batches[0].shape[1])
    probe = _Probe(graph_module, batches[0] if is_static(graph_module) else torch.cat(list(batches))[:wanted], dtype)
    found: dict[str, dict[int, float]] = {u.site.name: {} for u in units}

    def harm(logits: Tensor, what: str) -> float:
        tick()
        value = _mean(probe.divergence(logits), power, combine)
        if not math.isfinite(value):
            raise NumericsError(
                f"{what}: its harm is {value}, as the logits are not finite then or rule out what the dense model "
                "predicts; expected a number: run in float32, or in bfloat16 where float16 overflows"
            )
        return value

    def try_layer(layer: int) -> Callable[[Parking], None]:
        def at(parking: Parking) -> None:
            start = starts[layer]
            for cut in cuts.get(layer, []):
                logits = probe.logits_with(_stops([cut]), (start, parking.copy(0)))
                found[cut.units.site.name][cut.keep] = harm(logits, f"{cut.units.site.name} cut to {cut.keep}")
            if structure.layers[layer] in layers:
                before, after = boundaries[layer]
                past = {after: Stop(before, lambda _: _unchanged)}
                logits = probe.logits_with(past, (start, parking.copy(0)))
                found[structure.layers[layer]] = {0: harm(logits, f"{structure.layers[layer]} skipped")}

        return at

    levels = _levels([c for mine in cuts.values() for c in mine]) if together else []
    with (progress or SILENT)("harm", total=sum(map(len, cuts.values())) + len(layers) + len(levels)) as tick:
        probe.run(cuts={start: try_layer(i) for i, start in enumerate(starts)})
        for level in levels:
            alone = sum(found[c.units.site.name][c.keep] for c in level)
            of = f"all {level[0].units.site.kind} cut at once"
            factor = harm(probe.logits_with(_stops(level)), of) / alone if alone else 1.0
            for c in level:
                found[c.units.site.name][c.keep] *= factor
    return found


def curve(harm: Mapping[int, float], units: Units, widths: Sequence[int]) -> dict[int, float]:
    """Harm at widths between the measured ones: its square root is linear in between, as for a harm that is quadratic.

    A wider site never counts as more harmful than a narrower one.

    Args:
        harm: units kept per block -> harm, where it was measured.
        units: of the site.
        widths: units kept per block, none below the lowest measured.

    Returns:
        Width -> harm.
    """
    measured = sorted({**harm, units.block_size: 0.0}.items(), reverse=True)
    worst, points = 0.0, []
    for keep, value in measured:
        worst = max(worst, value)
        points.append((keep, worst**0.5))
    result = {}
    for keep in widths:
        (high, less), (low, more) = next(
            p for p in zip(points, [*points[1:], points[-1]], strict=True) if p[1][0] <= keep
        )
        share = (high - keep) / (high - low) if low < high else 0.0  # only the whole width is known
        result[keep] = (less + share * (more - less)) ** 2
    return result


@dataclass(frozen=True)
class _Cut:
    """One site at one width."""

    units: Units
    keep: int
    decision: Decision


def _decided(
    structure: Structure,
    batches: Sequence[Tensor],
    units: Sequence[Units],
    widths: Mapping[str, Sequence[int]],
    decide: Callable[[Units, Evidence, int], Decision],
    dtype: torch.dtype | None,
    combine: Combine,
    watch: Stopwatch,
    progress: Progress | None,
) -> dict[int, list[_Cut]]:
    """Layer -> every cut of its sites, from what the dense model holds there; a site outside all layers has none."""
    graph_module = structure.analysis.graph_module
    held_in = lower(graph_module, dtype)
    norms: dict[str, Norms] = {}
    cuts: dict[int, list[_Cut]] = {}

    def stop_at(u: Units, layer: int) -> Callable[[Sequence[Tensor]], None]:
        def stop(inputs: Sequence[Tensor]) -> None:
            evidence = evidence_at(
                structure, u, batches, inputs, Twin(inputs), norms, partial(tensor_at, graph_module), combine, watch
            )
            evidence.require_finite_input()
            for keep in widths[u.site.name]:
                decision = decide(u, evidence, keep)
                weight = decision.refit.weight.to(held_in)  # no more is read of it
                cut = _Cut(u, keep, replace(decision, refit=replace(decision.refit, weight=weight)))
                cuts.setdefault(layer, []).append(cut)

        return stop

    tried = [(u, u.site.layer) for u in units if u.site.layer is not None and widths[u.site.name]]
    run(
        graph_module,
        batches,
        observers=norm_observers([u for u, _ in tried], norms),
        stops={u.site.node: Stop(u.site.reads, stop_at(u, layer)) for u, layer in tried},
        dtype=dtype,
        progress=progress,
        stage="trial cuts",
    )
    return cuts


def _levels(cuts: Sequence[_Cut]) -> list[list[_Cut]]:
    """Cuts that are measured together: of every kind the narrowest of each site, then the next, and so on."""
    by_site: dict[str, list[_Cut]] = {}
    for cut in sorted(cuts, key=lambda c: c.keep):
        by_site.setdefault(cut.units.site.name, []).append(cut)
    levels: dict[tuple[str, int], list[_Cut]] = {}
    for mine in by_site.values():
        for rank, cut in enumerate(mine):
            levels.setdefault((cut.units.site.kind, rank), []).append(cut)
    return list(levels.values())


def _mean(divergence: Tensor, power: float, combine: Combine) -> float:
    """Power mean over the positions of all processes."""
    # Rounding leaves a little below zero where next to nothing changes.
    each = divergence.double().clamp(min=0) ** power
    total, count = combine(torch.tensor([float(each.sum()), each.numel()], dtype=torch.float64))
    return math.pow(float(total / count), 1 / power)


@dataclass
class _Probe:
    """A few samples (samples, tokens) that go to the logits, through the dense model or with sites cut."""

    graph_module: fx.GraphModule
    ids: Tensor
    dtype: torch.dtype | None
    _held: dict[str, Tensor] = field(default_factory=dict)  # for all cuts, in the dtype they are used in

    def __post_init__(self) -> None:
        (output,) = self.graph_module.graph.find_nodes(op="output")
        self._logits: fx.Node = output.all_input_nodes[0]
        self._last = _last_product(self._logits)
        self.dtype = lower(self.graph_module, self.dtype)
        weights = self.graph_module.graph.find_nodes(op="get_attr") if self.dtype is not None else []
        self._lowered = {str(n.target) for n in weights if feeds_products(n)}
        head = () if self._last is None else self._last.all_input_nodes[1:]
        self._head = [tensor_at(self.graph_module, str(p.target)).to(self.dtype) for p in head]
        logits = self.logits_with({})
        self._dense = logits.float().softmax(-1)
        if not torch.isfinite(self._dense).all():
            raise NumericsError(
                "the dense model's logits are not finite; expected a distribution of the next token: check the "
                "weights, and run in float32, or in bfloat16 where float16 overflows"
            )
        self._most = self._expected(logits)

    def run(
        self,
        *,
        look: Callable[[Tensor], None] = lambda _: None,
        stops: Mapping[str, Stop] | None = None,
        cuts: Mapping[str, Callable[[Parking], None]] | None = None,
        start: tuple[str, Parking] | None = None,
    ) -> None:
        """Run the samples to every fourth logit; somebody looks at these always, so that all on the way is kept."""
        few = {}
        if self._last is not None:
            few[self._last.name] = Stop(self._last.all_input_nodes[0].name, lambda _: self._few_positions)
        run(
            self.graph_module,
            [self.ids],
            weights=self._weights,
            observers=[Observer(self._logits.name, (self._logits.name,), look)],
            stops={**(stops or {}), **few},
            cuts=cuts,
            start=start,
            dtype=self.dtype,
        )

    def logits_with(self, stops: Mapping[str, Stop], start: tuple[str, Mapping[str, Any]] | None = None) -> Tensor:
        """(positions, vocabulary) of every fourth position, nodes replaced; from a node and its values on, if given."""
        found: list[Tensor] = []
        if start is None:
            self.run(look=found.append, stops=stops)
        else:
            parking = Parking(1)
            parking.put(0, dict(start[1]))
            # A cut, so that a segment begins where the parked values are.
            self.run(look=found.append, stops=stops, cuts={start[0]: lambda _: None}, start=(start[0], parking))
        logits = found[0] if self._last is not None else found[0][:, ::_STRIDE]
        return logits.flatten(0, -2)

    def divergence(self, logits: Tensor) -> Tensor:
        """(positions,) float32, KL divergence from the dense model's distributions, given (positions, vocabulary)."""
        return self._most - self._expected(logits)

    def _expected(self, logits: Tensor) -> Tensor:
        """(positions,) float32, log-probability of the dense model's next token."""
        least = torch.finfo(torch.float32).min  # of tokens that are masked: 0 times minus infinity would be no number
        return torch.cat(
            [
                torch.linalg.vecdot(self._dense[at], logits[at].float().log_softmax(-1).clamp_(min=least))
                for at in row_slices(logits)
            ]
        )

    def _few_positions(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x[:, ::_STRIDE], *self._head)

    def _weights(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = tensor_at(self.graph_module, name).to(self.dtype if name in self._lowered else None)
        return self._held[name]


def _stops(cuts: Sequence[_Cut]) -> dict[str, Stop]:
    """What is put in the places of the cut sites' projections."""
    return {cut.units.site.node: Stop(cut.units.site.reads, _always(projection(cut.decision))) for cut in cuts}


def _always(replacement: Projection) -> Callable[[Sequence[Tensor]], Projection]:
    return lambda _: replacement


def _unchanged(x: Tensor) -> Tensor:
    return x


def _last_product(node: fx.Node) -> fx.Node | None:
    """The linear layer that the logits come from, position by position; None where the graph ends in another way."""
    while node.target in _SAME_SHAPE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target is not torch.ops.aten.linear.default:
        return None
    _, *parameters = node.all_input_nodes
    return node if all(p.op == "get_attr" for p in parameters) and node.meta["val"].ndim == 3 else None
