"""What cutting one site does to the whole model: a library of (site, units kept) -> harm.

Every site is cut alone, to a few widths, with the scores and the fit that the sweep will use; everything else stays
dense. Harm is how far the distribution of the next token moves. A budget can then be shared out among all sites, heads
and channels alike, by what their units are worth.

A few calibration tokens stand for all text. What a site does for kinds of text that are not among them shows as a
large harm at few positions, so positions count by a mean of a higher power: the first layers, which make sense of rare
tokens, are spared.

The dense model is run once over all calibration tokens. At the end of each layer every cut of its sites is tried: the
first few samples go on from the beginning of the layer to the logits, at a lower precision if that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import CalibrationError
from slimgraph.evidence import Combine, Evidence, Twin, alone
from slimgraph.execute import Observer, Parking, Stop, feeds_products, lower, run
from slimgraph.groups import Structure
from slimgraph.moments import Norms
from slimgraph.progress import SILENT, Progress, Stopwatch
from slimgraph.sweep import Decision, evidence_at, norm_observers, projection
from slimgraph.trace import is_static, tensor_at
from slimgraph.units import Units

__all__ = ["Library", "curve", "measure"]

Library = Mapping[str, Mapping[int, float]]
"""Site name -> units kept per block -> harm, a mean of KL divergences from the dense model, in nats."""

_STRIDE = 4  # every so many positions the logits are looked at
_TOGETHER = 1 << 19  # logits that are looked at at a time
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
    power: float = 1.5,
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
        tokens: number of tokens, whole samples from the first micro-batch, that go to the logits with every cut; the
            divergence is taken at every fourth position.
        power: harm is the power mean of the positions' divergences: 1 for the mean, 2 for the root mean square.
        dtype: in which products are taken, the model's own by default; see `execute.lower`. A copy of the weights is
            held in it.
        combine: sums over processes.
        watch: collects the seconds that statistics take.
        progress: shows how far it got.

    Raises:
        CalibrationError: no calibration tokens.
        GraphError: the graph shows no layers.
    """
    if not batches or not sum(b.numel() for b in batches):
        raise CalibrationError("no calibration tokens; expected at least one sequence")
    graph_module = structure.analysis.graph_module
    boundaries = structure.boundaries()
    first, *others = batches
    samples = max(1, tokens // first.shape[1])
    pieces = [first] if is_static(graph_module) or len(first) <= samples else [first[:samples], first[samples:]]
    probe = _Probe(graph_module, pieces[0], dtype, power, combine)
    norms: dict[str, Norms] = {}
    tried: dict[int | None, list[tuple[Units, int, Decision]]] = {}
    found: dict[str, dict[int, float]] = {u.site.name: {} for u in units}
    at_start: dict[str, Any] = {}

    def stop_at(u: Units) -> Callable[[Sequence[Tensor]], None]:
        def stop(inputs: Sequence[Tensor]) -> None:
            evidence = evidence_at(
                structure, u, inputs, Twin(inputs), norms, probe.fetch, combine, watch or Stopwatch()
            )
            evidence.require_finite_input()
            mine = tried.setdefault(u.site.layer, [])
            mine += [(u, keep, decide(u, evidence, keep)) for keep in widths[u.site.name]]

        return stop

    def layer_done(layer: int) -> Callable[[Parking], None]:
        def at(parking: Parking) -> None:
            start = boundaries[layer - 1][1] if layer else boundaries[0][0]
            for u, keep, decision in tried.pop(layer, []):
                found[u.site.name][keep] = probe.harm(u, decision, start, at_start)
                tick()
            remember(parking)

        return at

    def remember(parking: Parking) -> None:
        at_start.clear()
        at_start.update(parking.copy(0))

    with (progress or SILENT)("harm", total=sum(map(len, widths.values()))) as tick:
        run(
            graph_module,
            [*pieces, *others],
            # Somebody looks at the logits, so that everything on the way there is kept.
            observers=[*norm_observers(units, norms), Observer(probe.logits, (), lambda: None)],
            stops={u.site.node: Stop(u.site.reads, stop_at(u)) for u in units},
            cuts={boundaries[0][0]: remember} | {after: layer_done(i) for i, (_, after) in enumerate(boundaries)},
            dtype=probe.dtype,
        )
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


@dataclass
class _Probe:
    """A few samples that go from the beginning of a layer to the logits."""

    graph_module: fx.GraphModule
    ids: Tensor
    dtype: torch.dtype | None
    power: float
    combine: Combine
    _held: dict[str, Tensor] = field(default_factory=dict)  # for all cuts, in the dtype they are used in

    def __post_init__(self) -> None:
        (output,) = self.graph_module.graph.find_nodes(op="output")
        self._logits: fx.Node = output.all_input_nodes[0]
        self._last = _last_product(self._logits)
        self.dtype = lower(self.graph_module, self.dtype)
        weights = self.graph_module.graph.find_nodes(op="get_attr") if self.dtype is not None else []
        self._lowered = {str(n.target) for n in weights if feeds_products(n)}
        head = () if self._last is None else self._last.all_input_nodes[1:]
        self._head = [self.fetch(str(p.target)).to(self.dtype) for p in head]
        logits = self._logits_of({}, None)
        self._dense = logits.float().softmax(-1)
        self._most = torch.cat([self._expected(logits[at], at) for at in _row_slices(logits)])

    @property
    def logits(self) -> str:
        """The node that makes them."""
        return self._logits.name

    def fetch(self, name: str) -> Tensor:
        """A parameter as the model has it."""
        return tensor_at(self.graph_module, name)

    def harm(self, units: Units, decision: Decision, start: str, values: Mapping[str, Any]) -> float:
        """Power mean of the KL divergences of the model with one site cut from the dense one, in nats."""
        parking = Parking(1)
        parking.put(0, dict(values))
        stops = {units.site.node: Stop(units.site.reads, lambda _: projection(decision))}
        logits = self._logits_of(stops, (start, parking))
        expected = torch.cat([self._expected(logits[at], at) for at in _row_slices(logits)])
        # Rounding leaves a little below zero where next to nothing changes.
        each = (self._most - expected).double().clamp(min=0) ** self.power
        total, count = self.combine(torch.tensor([float(each.sum()), each.numel()], dtype=torch.float64))
        return math.pow(float(total / count), 1 / self.power)

    def _expected(self, logits: Tensor, at: slice) -> Tensor:
        """(positions,) float32, log-probability of the dense model's next token by logits (positions, vocabulary)."""
        found: Tensor = torch.linalg.vecdot(self._dense[at], logits.float().log_softmax(-1))
        return found

    def _logits_of(self, stops: dict[str, Stop], start: tuple[str, Parking] | None) -> Tensor:
        """(positions, vocabulary)."""
        found: list[Tensor] = []
        if self._last is not None:
            stops = stops | {self._last.name: Stop(self._last.all_input_nodes[0].name, lambda _: self._few_positions)}
        run(
            self.graph_module,
            [self.ids],
            weights=self._weights,
            observers=[Observer(self.logits, (self.logits,), found.append)],
            stops=stops,
            cuts={} if start is None else {start[0]: lambda _: None},
            start=start,
            dtype=self.dtype,
        )
        logits = found[0] if self._last is not None else found[0][:, ::_STRIDE]
        return logits.flatten(0, -2)

    def _few_positions(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x[:, ::_STRIDE], *self._head)

    def _weights(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = self.fetch(name).to(self.dtype if name in self._lowered else None)
        return self._held[name]


def _row_slices(values: Tensor) -> Iterator[slice]:
    """Slices that cover the rows, so that what is worked out of some of them stays in the cache."""
    step = max(1, _TOGETHER // values.shape[1])
    return (slice(i, i + step) for i in range(0, len(values), step))


def _last_product(node: fx.Node) -> fx.Node | None:
    """The linear layer that the logits come from, position by position; None where the graph ends in another way."""
    while node.target in _SAME_SHAPE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target is not torch.ops.aten.linear.default:
        return None
    _, *parameters = node.all_input_nodes
    return node if all(p.op == "get_attr" for p in parameters) and node.meta["val"].ndim == 3 else None
