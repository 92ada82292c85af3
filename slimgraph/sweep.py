"""The sweep: run a traced graph node by node, stop at sites, decide there, and go on with the decision.

Calibration tokens go through in micro-batches, segment by segment: all micro-batches up to a site, then the site with
the statistics of all of them, then on. Weights are fetched when a node first needs them and dropped after its last use;
values are freed at their last use. Everything runs in the dtype of the graph's weights; statistics are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import CalibrationError, NumericsError
from slimgraph.evidence import Evidence, Source
from slimgraph.groups import Site, Structure
from slimgraph.moments import Moments, Norms
from slimgraph.progress import SILENT, Progress
from slimgraph.surgery import Refit
from slimgraph.trace import call, tensor_at
from slimgraph.units import Units, origin_units

__all__ = ["Decision", "Observer", "Weights", "layer_similarity", "run", "sweep"]

Weights = Callable[[str], Tensor]
"""Fetches a parameter or buffer by name."""


@dataclass(frozen=True)
class Observer:
    """Something that looks at values as they come by.

    Attributes:
        at: node after which it is called, once per micro-batch.
        needs: nodes whose values it is given; they are kept alive until then.
        call: what is called.
    """

    at: str
    needs: tuple[str, ...]
    call: Callable[..., None]


@dataclass(frozen=True)
class Decision:
    """What was decided at a site: units kept, input channels kept, and the new projection."""

    units: Tensor
    channels: Tensor
    refit: Refit


_Stop = Callable[[Sequence[Tensor]], Callable[[Tensor], Tensor] | None]


def run(
    graph_module: fx.GraphModule,
    batches: Sequence[Tensor],
    *,
    weights: Weights | None = None,
    observers: Sequence[Observer] = (),
    stops: Mapping[str, tuple[str, _Stop]] | None = None,
    progress: Progress | None = None,
    stage: str = "forward",
) -> None:
    """Run a graph over micro-batches up to the last node that anybody looks at.

    Args:
        graph_module: a traced graph.
        batches: micro-batches of token ids, (samples, tokens) int64 each.
        weights: fetches parameters; the graph module's own by default.
        observers: called as values come by.
        stops: node name -> (name of its input node, function). The function sees that input for all micro-batches at
            once and may return a replacement for the node: a function from input to output.
        progress: shows nodes as they are done.
        stage: what to call this in the progress.
    """
    stops = stops or {}
    fetch = weights or (lambda name: tensor_at(graph_module, name))
    watching: dict[str, list[Observer]] = {}
    for o in observers:
        watching.setdefault(o.at, []).append(o)
    held = {at: tuple(name for o in those for name in o.needs) for at, those in watching.items()}
    nodes = _needed(graph_module, {*stops, *watching, *(name for names in held.values() for name in names)})
    dying = _last_uses(nodes, held)
    by_name = {n.name: n for n in nodes}
    shared: dict[fx.Node, Any] = {}
    values: list[dict[fx.Node, Any]] = [{} for _ in batches]

    def step(node: fx.Node, replacement: Callable[[Tensor], Tensor] | None = None, reads: str = "") -> None:
        for mine, ids in zip(values, batches, strict=True):
            if node.op == "placeholder":
                mine[node] = ids
            elif replacement is not None:
                mine[node] = replacement(mine[by_name[reads]])
            else:
                mine[node] = call(node, _lookup(shared, mine))
            for o in watching.get(node.name, ()):
                o.call(*map(_lookup(shared, mine), (by_name[name] for name in o.needs)))

    with torch.no_grad(), (progress or SILENT)(stage, total=len(nodes)) as tick:
        for node in nodes:
            if node.op == "get_attr":
                shared[node] = fetch(str(node.target))
            elif node.name in stops:
                reads, decide = stops[node.name]
                step(node, decide([mine[by_name[reads]] for mine in values]), reads)
            else:
                step(node)
            for dead in dying.get(node, ()):
                shared.pop(dead, None)
                for mine in values:
                    mine.pop(dead, None)
            tick()


def _lookup(shared: dict[fx.Node, Any], mine: dict[fx.Node, Any]) -> Callable[[fx.Node], Any]:
    return lambda node: shared[node] if node in shared else mine[node]


def _needed(graph_module: fx.GraphModule, looked_at: set[str]) -> list[fx.Node]:
    """Nodes that the looked-at ones depend on, in graph order."""
    everything = [n for n in graph_module.graph.nodes if n.op != "output"]
    needed: set[fx.Node] = set()
    for node in reversed(everything):
        if node.name in looked_at or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [n for n in everything if n in needed]


def _last_uses(nodes: Sequence[fx.Node], held: Mapping[str, tuple[str, ...]]) -> dict[fx.Node, list[fx.Node]]:
    by_name = {n.name: n for n in nodes}
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        uses = [*node.all_input_nodes, *(by_name[h] for h in held.get(node.name, ()))]
        for used in [node, *uses]:
            last[used] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        dying.setdefault(node, []).append(used)
    return dying


def layer_similarity(
    structure: Structure,
    batches: Sequence[Tensor],
    *,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Mean over tokens of the cosine similarity between each layer's input and output (SlimLLM, section 3.5).

    Computed in float32 on the dense model.

    Raises:
        CalibrationError: a layer's input or output cannot be told from the graph.
    """
    sums = [0.0] * len(structure.layers)
    counts = [0] * len(structure.layers)

    def watch(layer: int) -> Callable[[Tensor, Tensor], None]:
        def look(before: Tensor, after: Tensor) -> None:
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[layer] += float(cosine.double().sum())
            counts[layer] += cosine.numel()

        return look

    observers = [
        Observer(after, (before, after), watch(layer)) for layer, (before, after) in enumerate(structure.boundaries())
    ]
    graph_module = structure.analysis.graph_module
    run(graph_module, batches, weights=weights, observers=observers, progress=progress, stage="dense forward")
    return [s / c for s, c in zip(sums, counts, strict=True)]


def sweep(
    structure: Structure,
    batches: Sequence[Tensor],
    units: Sequence[Units],
    decide: Callable[[Units, Evidence], Decision | None],
    *,
    weights: Weights | None = None,
    progress: Progress | None = None,
    after: Callable[[Site, Decision | None], None] | None = None,
) -> dict[str, Decision]:
    """Visit sites in graph order, each with the activations that the already pruned sites before it produce.

    Args:
        structure: groups and sites.
        batches: micro-batches of calibration tokens, (samples, tokens) int64 each.
        units: the sites to visit.
        decide: called at each site with its evidence; None leaves the site as it is.
        weights: fetches parameters; the graph module's own by default.
        progress: shows how far it got.
        after: called when a site is done.

    Returns:
        Site name -> decision, for the sites that were cut.

    Raises:
        CalibrationError: no calibration tokens.
        NumericsError: NaN or infinity in the activations, naming the site.
    """
    if not batches or not sum(b.numel() for b in batches):
        raise CalibrationError("no calibration tokens; expected at least one sequence")
    fetch = weights or (lambda name: tensor_at(structure.analysis.graph_module, name))
    decisions: dict[str, Decision] = {}
    norms: dict[str, Norms] = {}
    observers = [
        Observer(o.node, (o.reads,), _accumulate(norms, o.reads, o.node, site))
        for o, site in {o.node: (o, u.site.name) for u in units for o in u.site.origins}.values()
    ]

    def stop_at(u: Units) -> _Stop:
        def stop(inputs: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
            decision = decide(u, _evidence(structure, u, inputs, norms, fetch))
            if after is not None:
                after(u.site, decision)
            if decision is None:
                return None
            decisions[u.site.name] = decision
            return _projection(decision)

        return stop

    stops = {u.site.node: (u.site.reads, stop_at(u)) for u in units}
    run(
        structure.analysis.graph_module,
        batches,
        weights=weights,
        observers=observers,
        stops=stops,
        progress=progress,
        stage="sweep",
    )
    return decisions


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


def _evidence(
    structure: Structure, units: Units, inputs: Sequence[Tensor], norms: dict[str, Norms], fetch: Weights
) -> Evidence:
    site = units.site
    moments = Moments.empty(site.channels, device=inputs[0].device)
    try:
        for x in inputs:
            moments.update(x)
    except NumericsError as error:
        raise NumericsError(f"site {site.name} (input {site.reads}): {error}") from error
    device = inputs[0].device
    sources = tuple(
        Source(
            weight=_oriented(fetch(o.parameter), o.in_dim).to(device),
            units=origin_units(structure, units, o).to(device),
            input_norms=norms[o.node].norms,
        )
        for o in site.origins
        if o.node in norms
    )
    bias = fetch(site.bias) if site.bias else None
    return Evidence(
        weight=_oriented(fetch(site.parameter), site.in_dim),
        bias=bias,
        moments=moments,
        units=units.members.to(device),
        blocks=units.blocks.to(device),
        sources=sources,
        kind=site.kind,
        name=site.name,
    )


def _oriented(weight: Tensor, in_dim: int) -> Tensor:
    """(out, in), whichever way the parameter is stored."""
    return weight if in_dim == 1 else weight.T


def _projection(decision: Decision) -> Callable[[Tensor], Tensor]:
    weight, bias = decision.refit.weight, decision.refit.bias

    def project(x: Tensor) -> Tensor:
        bias_here = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x[..., decision.channels], weight.to(x.dtype), bias_here)

    return project
