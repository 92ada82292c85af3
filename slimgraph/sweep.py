"""The sweep: meet the sites in graph order, decide at each, and go on with the decision.

At a site everything needed to prune it is at hand: its weight, and its input for all calibration tokens as the sites
before it, already pruned, produce it. Removing units there only drops columns of that input, so the recovered output
follows at once, and the whole model is scored, pruned and refitted in one pass over the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.errors import CalibrationError, GraphError, NumericsError
from slimgraph.evidence import Combine, Evidence, Source, Twin, alone, precision_for
from slimgraph.execute import Observer, Parking, Stop, Weights, run
from slimgraph.groups import Structure
from slimgraph.moments import Norms
from slimgraph.progress import Progress, Stopwatch
from slimgraph.surgery import Refit
from slimgraph.trace import tensor_at
from slimgraph.units import Units, origin_units

__all__ = ["Decision", "Projection", "evidence_at", "layer_similarity", "norm_observers", "projection", "sweep"]

Projection = Callable[[Tensor], Tensor]
"""What stands in place of a site's node: from its dense input to its output."""


@dataclass(frozen=True)
class Decision:
    """What was decided at a site: units kept, input channels kept, and the new projection."""

    units: Tensor
    channels: Tensor
    refit: Refit


def layer_similarity(
    structure: Structure,
    batches: Sequence[Tensor],
    *,
    weights: Weights | None = None,
    combine: Combine = alone,
    progress: Progress | None = None,
) -> list[float]:
    """Mean over tokens of the cosine similarity between each layer's input and output (SlimLLM, section 3.5).

    Computed in float32 on the dense model.

    Args:
        structure: groups and layers.
        batches: micro-batches of calibration tokens, (samples, tokens) int64 each.
        weights: fetches parameters; the graph module's own by default.
        combine: sums over processes.
        progress: shows how far it got.

    Raises:
        GraphError: a layer's input or output cannot be told from the graph.
    """
    sums = torch.zeros(2, len(structure.layers), dtype=torch.float64)

    def watch(layer: int) -> Callable[[Tensor, Tensor], None]:
        def look(before: Tensor, after: Tensor) -> None:
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[0, layer] += float(cosine.double().sum())
            sums[1, layer] += cosine.numel()

        return look

    boundaries = structure.boundaries()
    observers = [Observer(after, (before, after), watch(layer)) for layer, (before, after) in enumerate(boundaries)]
    run(
        structure.analysis.graph_module,
        batches,
        weights=weights,
        observers=observers,
        cuts={after: _nothing for _, after in boundaries},
        progress=progress,
        stage="dense forward",
    )
    total, count = combine(sums)
    similarity: list[float] = (total / count).tolist()
    return similarity


def sweep(
    structure: Structure,
    batches: Sequence[Tensor],
    units: Sequence[Units],
    decide: Callable[[Units, Evidence], Decision | None],
    *,
    weights: Weights | None = None,
    combine: Combine = alone,
    watch: Stopwatch | None = None,
    progress: Progress | None = None,
    remember: Callable[[Units, Decision], Decision] | None = None,
    layer_done: Callable[[int, Parking], None] | None = None,
    start: tuple[int, Parking] | None = None,
    twin: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Decision]:
    """Visit sites in graph order, each with the activations that the already pruned sites before it produce.

    Args:
        structure: groups and sites.
        batches: micro-batches of calibration tokens, (samples, tokens) int64 each.
        units: the sites to visit.
        decide: called at each site with its evidence; None leaves the site as it is.
        weights: fetches parameters; the graph module's own by default.
        combine: sums over processes.
        watch: collects the seconds that statistics take.
        progress: shows how far it got.
        remember: called when a site is cut; what it returns stands in the result in place of the decision.
        layer_done: called with a layer's index and all parked values once every micro-batch is past that layer, for
            layers whose output the graph shows, up to the last site.
        start: layer after which to go on, and what was parked there.
        twin: send every micro-batch through the dense model too, side by side, so that evidence has what that holds at
            the same place. What is parked is then that of twice as many micro-batches.
        dtype: in which the model's products are taken, its own by default; statistics and fits do not depend on it.

    Returns:
        Site name -> decision, for the sites that were cut.

    Raises:
        CalibrationError: no calibration tokens.
        NumericsError: NaN or infinity in the activations, naming the site.
    """
    if not batches or not sum(b.numel() for b in batches):
        raise CalibrationError("no calibration tokens; expected at least one sequence")
    if not units:
        return {}
    fetch = weights or (lambda name: tensor_at(structure.analysis.graph_module, name))
    decisions: dict[str, Decision] = {}
    norms: dict[str, Norms] = {}
    observers = norm_observers(units, norms)

    streams = {u.site.name: structure.joined(u.site) for u in units} if twin else {}

    def stop_at(u: Units) -> Callable[..., Callable[[Tensor], Tensor] | None]:
        def stop(values: Sequence[Tensor], stream: Sequence[Tensor] | None = None) -> Projection | None:
            inputs, dense = _halves(values) if twin else (values, None)
            beside = None if dense is None else Twin(dense, None if stream is None else _halves(stream))
            evidence = evidence_at(structure, u, batches, inputs, beside, norms, fetch, combine, watch or Stopwatch())
            evidence.require_finite_input()
            decision = decide(u, evidence)
            if decision is None:
                return None
            decisions[u.site.name] = decision if remember is None else remember(u, decision)
            return projection(decision)

        return stop

    ends = _layer_ends(structure, units)
    if start is not None:
        _check_start(structure, units, ends[start[0]])
    run(
        structure.analysis.graph_module,
        [*batches, *batches] if twin else batches,
        weights=weights,
        twins=len(batches) if twin else 0,
        dtype=dtype,
        observers=observers,
        stops={u.site.node: Stop(u.site.reads, stop_at(u), _named(streams.get(u.site.name))) for u in units},
        cuts={node: _calling(layer_done, layer) for layer, node in ends.items()},
        start=None if start is None else (ends[start[0]], start[1]),
        progress=progress,
        stage="sweep",
    )
    return decisions


def _nothing(parking: Parking) -> None:
    """A cut at which weights are dropped and nobody looks."""


def _calling(layer_done: Callable[[int, Parking], None] | None, layer: int) -> Callable[[Parking], None]:
    return _nothing if layer_done is None else lambda parking: layer_done(layer, parking)


def _layer_ends(structure: Structure, units: Sequence[Units]) -> Mapping[int, str]:
    """Layer -> the node that leaves it, up to the last layer with a site; nothing where the graph shows no layers."""
    last = max((u.site.layer for u in units if u.site.layer is not None), default=-1)
    try:
        boundaries = structure.boundaries()
    except GraphError:
        return {}
    return {layer: after for layer, (_, after) in enumerate(boundaries[: last + 1])}


def _check_start(structure: Structure, units: Sequence[Units], after: str) -> None:
    """What a site's statistics are taken from must lie after the place where the sweep goes on."""
    order = {n.name: i for i, n in enumerate(structure.analysis.graph_module.graph.nodes)}
    for u in units:
        for node in [u.site.node, *(o.node for o in u.site.origins)]:
            if order[node] <= order[after]:
                raise CalibrationError(
                    f"site {u.site.name}: {node} lies before {after}, where the sweep was to go on; start from the "
                    "beginning"
                )


def norm_observers(units: Sequence[Units], norms: dict[str, Norms]) -> list[Observer]:
    """Observers that gather the norms of what the projections that feed these sites read, by node, into `norms`."""
    return [
        Observer(o.node, (o.reads,), _accumulate(norms, o.reads, o.node, site))
        for o, site in {o.node: (o, u.site.name) for u in units for o in u.site.origins}.values()
    ]


def _accumulate(norms: dict[str, Norms], reads: str, node: str, site: str) -> Callable[[Tensor], None]:
    def look(x: Tensor) -> None:
        if node not in norms:
            norms[node] = Norms.empty(x.shape[-1], device=x.device)
        try:
            norms[node].update(x)
        except NumericsError as error:
            raise NumericsError(
                f"site {site} (value {reads}, which a projection that feeds it reads): {error}"
            ) from error

    return look


def _halves(values: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Values of the pruned model, and of the dense one that runs beside it."""
    middle = len(values) // 2
    return values[:middle], values[middle:]


def _named(node: str | None) -> tuple[str, ...]:
    return () if node is None else (node,)


def evidence_at(
    structure: Structure,
    units: Units,
    batches: Sequence[Tensor],
    inputs: Sequence[Tensor],
    twin: Twin | None,
    norms: Mapping[str, Norms],
    fetch: Callable[[str], Tensor],
    combine: Combine,
    watch: Stopwatch,
) -> Evidence:
    """What is known about a site from its input and from the norms that `norm_observers` gathered.

    Args:
        structure: of the graph.
        units: the site's.
        batches: micro-batches, (samples, tokens) int64 each.
        inputs: the site's input for each of them, (..., channels).
        twin: what the dense model holds there, where it runs beside.
        norms: by node that reads them, of what the projections that feed the site read.
        fetch: parameters by name.
        combine: sums over processes.
        watch: collects the seconds that statistics take.
    """
    site = units.site
    device = inputs[0].device
    sources = tuple(
        Source(
            weight=_oriented(fetch(o.parameter), o.in_dim).to(device),
            units=origin_units(structure, units, o).to(device),
            input_norms=combine(norms[o.node].squares.clone()).sqrt(),
        )
        for o in site.origins
        if o.node in norms
    )
    weight = _oriented(fetch(site.parameter), site.in_dim)
    return Evidence(
        weight=weight,
        bias=fetch(site.bias) if site.bias else None,
        inputs=inputs,
        twin=twin,
        samples=[len(b) for b in batches],
        units=units.members.to(device),
        blocks=units.blocks.to(device),
        sources=sources,
        kind=site.kind,
        name=site.name,
        precision=precision_for(weight.dtype),
        combine=combine,
        watch=watch,
    )


def _oriented(weight: Tensor, in_dim: int) -> Tensor:
    """(out, in), whichever way the parameter is stored."""
    return weight if in_dim == 1 else weight.T


def projection(decision: Decision) -> Projection:
    """What a decision makes of the site's dense input, in the dtype of that input."""
    weight, bias = decision.refit.weight, decision.refit.bias

    def project(x: Tensor) -> Tensor:
        bias_here = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x[..., decision.channels], weight.to(x.dtype), bias_here)

    return project
