"""Running a traced graph over more tokens and more weights than memory holds at once.

A run goes through the graph in *segments*, and through each segment micro-batch by micro-batch. Between segments only
the values that later nodes read are kept ("parked"), in memory up to a bound and on disk beyond it; within a segment a
value is freed at its last use. Weights are fetched when a segment first needs them and dropped after the segment that
uses them last. A segment ends before every *stop*, where all micro-batches are looked at together, and at every *cut*,
usually the end of a layer, so that few weights are held at a time.

Everything runs in the dtype of the graph's weights, or with its products in a lower one, under autocast: what is added
up from layer to layer then keeps its digits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from slimgraph.capacity import memory_free
from slimgraph.errors import CalibrationError
from slimgraph.progress import SILENT, Progress
from slimgraph.trace import call, tensor_at

__all__ = ["Observer", "Parking", "Stop", "Weights", "feeds_products", "lower", "run"]

Weights = Callable[[str], Tensor]
"""Fetches a parameter or buffer by name. Where it has a method `expect(names)`, it is told what will be asked for."""

_PRODUCTS = {torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.ops.aten.matmul.default}


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
class Stop:
    """A node at which all micro-batches are looked at together before any of them goes on.

    Attributes:
        reads: the node's input.
        decide: is given that input of all micro-batches, then those of the nodes in `also`, and may return a
            replacement for the node: a function from input to output.
        also: other nodes before this one whose values are looked at; they are kept alive until then.
    """

    reads: str
    decide: Callable[..., Callable[[Tensor], Tensor] | None]
    also: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """All nodes whose values are looked at."""
        return (self.reads, *self.also)


def run(
    graph_module: fx.GraphModule,
    batches: Sequence[Tensor],
    *,
    weights: Weights | None = None,
    observers: Sequence[Observer] = (),
    stops: Mapping[str, Stop] | None = None,
    cuts: Mapping[str, Callable[[Parking], None]] | None = None,
    start: tuple[str, Parking] | None = None,
    room: int | None = None,
    twins: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    stage: str = "forward",
) -> None:
    """Run a graph over micro-batches up to the last node that anybody looks at.

    Args:
        graph_module: a traced graph.
        batches: micro-batches of token ids, (samples, tokens) int64 each.
        weights: fetches parameters; the graph module's own by default.
        observers: called as values come by.
        stops: by node name.
        cuts: node name -> what is called with everything that is parked once all micro-batches are past that node.
        start: a cut and what was parked there, to go on from instead of the beginning.
        room: bytes of parked values that are kept in memory, a quarter of the free memory by default; what is beyond
            goes to temporary files.
        twins: the last so many micro-batches go through the graph as it is: no replacement is put in place of their
            nodes, and no observer sees them; stops do.
        dtype: in which products are taken, as `lower` has it; None for the model's own. Observers and stops run without
            autocast.
        progress: shows nodes as they are done.
        stage: what to call this in the progress.
    """
    stops, cuts = stops or {}, cuts or {}
    dtype = lower(graph_module, dtype)
    looked_at = {*stops, *cuts, *(name for o in observers for name in (o.at, *o.needs))}
    looked_at |= {name for stop in stops.values() for name in stop.needs}
    nodes = _needed(graph_module, looked_at)
    dying = _last_uses(nodes, observers, stops)
    watching: dict[str, list[Observer]] = {}
    for o in observers:
        watching.setdefault(o.at, []).append(o)
    segments = _segments(nodes, stops, cuts)
    if start is not None:
        names = [n.name for n in nodes]
        done = names.index(start[0]) + 1
        segments = [s for s in segments if names.index(s[0].name) >= done]
    with ExitStack() as stack:
        parking = stack.enter_context(start[1] if start is not None else Parking(len(batches), room))
        stack.enter_context(torch.no_grad())
        tick = stack.enter_context((progress or SILENT)(stage, total=sum(map(len, segments)) * len(batches)))
        shared = _Shared(weights or (lambda name: tensor_at(graph_module, name)), segments, dtype)
        for segment in segments:
            shared.begin(segment)
            stop = stops.get(segment[0].name)
            replacement = stop.decide(*map(parking.all, stop.needs)) if stop is not None else None
            for i, ids in enumerate(batches):
                values = parking.take(i)
                is_twin = i >= len(batches) - twins
                last = i == len(batches) - 1
                with _autocast(ids.device, dtype):
                    if stop is not None and replacement is not None and not is_twin:
                        values[segment[0].name] = replacement(values[stop.reads])
                    for node in segment:
                        _step(node, ids, values, shared)
                        if last:
                            shared.used(node)
                        for o in () if is_twin else watching.get(node.name, ()):
                            with torch.autocast(ids.device.type, enabled=False):
                                o.call(*(values[name] for name in o.needs))
                        for dead in dying.get(node, ()):
                            values.pop(dead, None)
                        tick()
                parking.put(i, values)
            if segment[-1].name in cuts:
                cuts[segment[-1].name](parking)


def lower(graph_module: fx.GraphModule, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to take products in under autocast, or None: only a model whose weights are float32 gains by it."""
    found = {p.dtype for p in graph_module.parameters() if p.ndim > 1 and p.is_floating_point()}
    return dtype if found == {torch.float32} else None


def feeds_products(node: fx.Node) -> bool:
    """Whether a weight is read by matrix products only, so that a lower dtype than theirs is lost on nobody."""
    return all(user.target in _PRODUCTS for user in node.users)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    # The graph's own casts name the dtype it was traced in, so it cannot simply be run in another one.
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _step(node: fx.Node, ids: Tensor, values: dict[str, Any], shared: _Shared) -> None:
    """Work out one node's value, unless it is there already."""
    if node.name in values:
        return
    if node.op == "placeholder":
        values[node.name] = ids
    else:
        values[node.name] = call(node, lambda n: shared[n] if n.op == "get_attr" else values[n.name])


class Parking:
    """Values of all micro-batches between two segments: node name -> value, per micro-batch.

    Args:
        count: number of micro-batches.
        room: bytes kept in memory, by default a quarter of what is free on the values' device when the first are
            parked; micro-batches beyond go to temporary files.
    """

    def __init__(self, count: int, room: int | None = None) -> None:
        self._values: list[dict[str, Any]] = [{} for _ in range(count)]
        self._files: dict[int, Path] = {}
        self._room = room
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Parking:
        return self

    def __exit__(self, *_: object) -> None:
        self._values = []
        if self._folder is not None:
            self._folder.cleanup()

    def take(self, index: int) -> dict[str, Any]:
        """The values of one micro-batch, which are no longer parked."""
        values, self._values[index] = self._values[index], {}
        file = self._files.pop(index, None)
        if file is not None:
            values |= _read(file, values.pop(_DEVICE))
            file.unlink()
        return values

    def put(self, index: int, values: dict[str, Any]) -> None:
        """Park the values of one micro-batch."""
        self._values[index] = values
        tensors = _tensors(values)
        if not tensors:
            return
        device = next(iter(tensors.values())).device
        if self._room is None:
            self._room = memory_free(device) // 4
        if self._bytes() <= self._room:
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="slimgraph-")
        file = Path(self._folder.name) / f"{index}.safetensors"
        _write(tensors, file)
        self._values[index] = {n: v for n, v in values.items() if n not in tensors} | {_DEVICE: device}
        self._files[index] = file

    def all(self, name: str) -> Sequence[Tensor]:
        """One value of all micro-batches, read from where it is each time it is asked for."""
        return _Column(self, name)

    def save(self, folder: Path) -> None:
        """Write everything that is parked as safetensors files into a folder.

        Raises:
            CalibrationError: a value is neither a tensor nor a number.
        """
        for i in range(len(self._values)):
            values = self.take(i)
            _write({**_tensors(values), **_numbers(values)}, folder / f"{i}.safetensors")
            self.put(i, values)

    @classmethod
    def load(cls, folder: Path, device: torch.device, room: int | None = None) -> Parking:
        """What `save` wrote, as many micro-batches as there are files."""
        parking = cls(len(list(folder.glob("*.safetensors"))), room)
        for i in range(len(parking)):
            stored = _read(folder / f"{i}.safetensors", device)
            parking.put(
                i, {n.removeprefix(_NUMBER): v.item() if n.startswith(_NUMBER) else v for n, v in stored.items()}
            )
        return parking

    def look(self, index: int, name: str) -> Tensor:
        """One value of one micro-batch; it stays parked."""
        if index not in self._files:
            value: Tensor = self._values[index][name]
            return value
        with safe_open(self._files[index], framework="pt", device=str(self._values[index][_DEVICE])) as file:
            stored: Tensor = file.get_tensor(name)
            return stored

    def copy(self, index: int) -> dict[str, Any]:
        """All values of one micro-batch; they stay parked."""
        values = self.take(index)
        self.put(index, dict(values))
        return values

    def __len__(self) -> int:
        return len(self._values)

    def _bytes(self) -> int:
        # Values that micro-batches share, like a mask made for all of them, count each time: a bound, not a measure.
        return sum(v.nbytes for values in self._values for v in values.values() if isinstance(v, Tensor))


# No node has such a name.
_DEVICE = "<device>"  # where the tensors of a file were
_NUMBER = "<number>"


class _Column(Sequence[Tensor]):
    def __init__(self, parking: Parking, name: str, places: range | None = None) -> None:
        self._parking, self._name = parking, name
        self._places = range(len(parking)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Column(self._parking, self._name, self._places[index])
        return self._parking.look(self._places[index], self._name)


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: v for name, v in values.items() if isinstance(v, Tensor)}


def _numbers(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sizes and other numbers as tensors, under names of their own."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            continue
        if not isinstance(value, (bool, int, float)):
            raise CalibrationError(f"{name}: found a {type(value).__name__}, which cannot be kept from layer to layer")
        found[_NUMBER + name] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return found


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, file)


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    with safe_open(file, framework="pt", device=str(device)) as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # not a dict


class _Shared:
    """Weights that are in use: fetched at their first use, dropped at the last, when the last micro-batch is there."""

    def __init__(
        self, weights: Weights, segments: Sequence[Sequence[fx.Node]], dtype: torch.dtype | None = None
    ) -> None:
        self._weights = weights
        self._dtype = dtype
        self._expect: Callable[[Sequence[str]], None] | None = getattr(weights, "expect", None)
        self._held: dict[fx.Node, Tensor] = {}
        last: dict[fx.Node, fx.Node] = {}
        self._reads: dict[fx.Node, list[str]] = {}  # first node of a segment -> names that no earlier one reads
        for segment in segments:
            new = [a for n in segment for a in n.all_input_nodes if a.op == "get_attr" and a not in last]
            self._reads[segment[0]] = [str(a.target) for a in dict.fromkeys(new)]
            last |= {a: n for n in segment for a in n.all_input_nodes if a.op == "get_attr"}
        self._order = list(self._reads)
        self._dropped: dict[fx.Node, list[fx.Node]] = {}
        for weight, node in last.items():
            self._dropped.setdefault(node, []).append(weight)

    def __getitem__(self, node: fx.Node) -> Tensor:
        if node not in self._held:
            weight = self._weights(str(node.target))
            if self._dtype is not None and weight.is_floating_point() and feeds_products(node):
                weight = weight.to(self._dtype)  # once, not for every micro-batch
            self._held[node] = weight
        return self._held[node]

    def begin(self, segment: Sequence[fx.Node]) -> None:
        """Say what this segment and the next will read."""
        if self._expect is not None:
            at = self._order.index(segment[0])
            self._expect([name for first in self._order[at : at + 2] for name in self._reads[first]])

    def used(self, node: fx.Node) -> None:
        """The last micro-batch is past the node."""
        for weight in self._dropped.get(node, ()):
            self._held.pop(weight, None)


def _needed(graph_module: fx.GraphModule, looked_at: set[str]) -> list[fx.Node]:
    """Nodes that the looked-at ones depend on, in graph order; weights are fetched, not run."""
    everything = [n for n in graph_module.graph.nodes if n.op != "output"]
    needed: set[fx.Node] = set()
    for node in reversed(everything):
        if node.name in looked_at or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [n for n in everything if n in needed and n.op != "get_attr"]


def _segments(
    nodes: Sequence[fx.Node], before: Mapping[str, object], after: Mapping[str, object]
) -> list[list[fx.Node]]:
    segments: list[list[fx.Node]] = [[]]
    for node in nodes:
        if node.name in before and segments[-1]:
            segments.append([])
        segments[-1].append(node)
        if node.name in after:
            segments.append([])
    return [s for s in segments if s]


def _last_uses(
    nodes: Sequence[fx.Node], observers: Sequence[Observer], stops: Mapping[str, Stop]
) -> dict[fx.Node, list[str]]:
    held: dict[str, list[str]] = {name: list(stop.needs) for name, stop in stops.items()}
    for o in observers:
        held.setdefault(o.at, []).extend(o.needs)
    last: dict[str, fx.Node] = {}
    for node in nodes:
        last[node.name] = node
        for used in [*(a.name for a in node.all_input_nodes if a.op != "get_attr"), *held.get(node.name, ())]:
            last[used] = node
    dying: dict[fx.Node, list[str]] = {}
    for used, node in last.items():
        dying.setdefault(node, []).append(used)
    return dying
