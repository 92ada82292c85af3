"""Where a pruned model goes wrong: both graphs on the same tokens, compared node by node.

Every aligned value is compared twice. *Accumulated*: each model runs on its own, so that errors add up with depth.
*Own*: the pruned model runs with every value that pruning is meant to change put back to the dense one once it was
compared. What a site loses is then its own doing, and a difference anywhere else is a fault: a wrong index, a stale
attribute, weights of another model. A site is suspect when its refit is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.debug.compare import Distance, Losses
from slimgraph.debug.findings import Bisection, Layer, Node, Projection
from slimgraph.debug.opened import Opened, Source, open_model, plan_between, skipped_in, without_layers
from slimgraph.debug.restore import restorations
from slimgraph.debug.weave import Strands, Thread, weave
from slimgraph.errors import CalibrationError, ModelError, PlanError
from slimgraph.execute import Observer, run
from slimgraph.groups import Site
from slimgraph.module import tolerance
from slimgraph.plan import Plan, Resolved, resolve
from slimgraph.pretrained import check_tokens
from slimgraph.progress import SILENT, Progress
from slimgraph.rules import operator_name
from slimgraph.trace import is_static, module_path

__all__ = ["bisect"]

_LOGITS_AT_ONCE = 2**27  # elements of one model's logits that are held at a time
_SUSPECT = 1.25  # a refit that is so much worse than none is worth a look
_NOTHING = 1e-6  # relative error below which a site has lost nothing


def bisect(
    dense: Source | Opened,
    pruned: Source | Opened,
    tokens: Tensor,
    *,
    seq_len: int = 128,
    batch: int = 4,
    plan: Plan | None = None,
    threshold: float = 0.1,
    restore: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Bisection:
    """Compare a pruned model with the dense one it was made from, node by node.

    Weights of checkpoints on disk are read when they are needed; values are freed at their last use. Layers that the
    plan skips are left out of the dense model as well: what that costs is not among the errors.

    Args:
        dense: the model before: in memory, or the directory or hub name of one.
        pruned: the model after, likewise.
        tokens: (n,) int64, one stream; the tail that does not fill a window is left out.
        seq_len: tokens of each window.
        batch: windows at once.
        plan: which units stayed; by default what the checkpoints say.
        threshold: of the accumulated relative error, for `first_past_threshold`.
        restore: also measure what restoring each layer alone does, at the cost of half a run per layer.
        dtype: of weights that are read.
        device: where they go.
        trust_remote_code: let checkpoints bring their own modeling code.
        progress: shows how far it got.

    Raises:
        ModelError: a model cannot be loaded or run, or the two are not of one kind.
        PlanError: the plan is not one for the dense model.
        CalibrationError: fewer tokens than a window, or some that the model does not know.
        GraphError: a layer cannot be exchanged alone; ask for `restore=False`.
    """
    if len(tokens) < seq_len or seq_len < 2:
        raise CalibrationError(f"found {len(tokens)} tokens, expected at least one window of {seq_len} (2 or more)")
    progress = progress or SILENT
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    with progress("trace"):
        before = open_model(dense, shape=(1, seq_len), **options)
        after = open_model(pruned, shape=(1, seq_len), **options)
    if plan is None:
        plan = plan_between(before.manifest, after.manifest)
    before = without_layers(before, skipped_in(before, after, plan))
    _check_alike(before, after)
    resolved = None if plan is None else resolve(before.structure, Plan(plan.cuts))
    batches = _batches(before, after, tokens.to(after.device), seq_len, batch)
    check_tokens(before.model, tokens, seq_len)
    return _Run(before, after, resolved, batches, threshold, progress).bisection(seq_len, restore)


@dataclass
class _Seen:
    """What is gathered about a thread: accumulated, own, and without a refit."""

    thread: Thread
    free: Distance = field(default_factory=Distance)
    own: Distance = field(default_factory=Distance)
    bare: Distance = field(default_factory=Distance)

    def observers(self) -> list[Observer]:
        kept = self.thread.kept or {}
        pairs = [(self.thread.free, self.free, kept), (self.thread.forced, self.own, kept)]
        if self.thread.masked is not None:
            pairs.append((self.thread.masked, self.bare, {}))
        return [Observer(at, (self.thread.dense, at), _adding(distance, those)) for at, distance, those in pairs]


class _Run:
    def __init__(
        self,
        dense: Opened,
        pruned: Opened,
        resolved: Resolved | None,
        batches: Sequence[Tensor],
        threshold: float,
        progress: Progress,
    ) -> None:
        self.dense, self.pruned, self.resolved = dense, pruned, resolved
        self.batches, self.threshold, self.progress = batches, threshold, progress
        # Without a plan nothing is known of what is meant, unless nothing was cut at all.
        self.known = resolved is not None or not _reshaped(dense, pruned)

    def bisection(self, seq_len: int, restore: bool) -> Bisection:
        strands, threads = weave(self.dense, self.pruned, self.resolved)
        moving = self.dense.structure.analysis.moving
        seen = [_Seen(t) for t in threads if t.node in moving and t.kept is not None and _is_tensor(t.node)]
        if not seen:
            raise ModelError(
                f"no node of {self.pruned.name} does what one of {self.dense.name} does; expected a model "
                "pruned from it"
            )
        whole = Losses()
        last = threads[-1]
        observers = [o for s in seen for o in s.observers()]
        observers.append(Observer(last.free, (strands.ids.name, last.dense, last.free), whole.add))
        self._run(strands, observers, "compare")
        kl, dense_loss, pruned_loss = whole.mean()
        restored = self._restored() if restore else []
        calls = sum(n.op == "call_function" for g in (self.dense, self.pruned) for n in g.graph.graph.nodes)
        return Bisection(
            dense=self.dense.name,
            pruned=self.pruned.name,
            tokens=sum(b.numel() for b in self.batches),
            seq_len=seq_len,
            threshold=self.threshold,
            tolerance=tolerance(self.pruned.graph),
            kl=kl,
            dense_loss=dense_loss,
            pruned_loss=pruned_loss,
            nodes=tuple(self._node(s) for s in seen),
            sites=tuple(self._sites(seen)),
            layers=tuple(self._layers(seen, restored, kl)),
            unaligned=calls - 2 * len(threads),
            planned=self.resolved is not None,
        )

    def _run(self, strands: Strands, observers: Sequence[Observer], stage: str) -> None:
        """A few batches at a time, so that logits fit; the weights are fetched again for each such part."""
        (output,) = self.dense.graph.graph.find_nodes(op="output")
        vocabulary = int(output.args[0].meta["val"].shape[-1])
        at_once = max(1, _LOGITS_AT_ONCE // (vocabulary * self.batches[0].numel()))
        graph = strands.module()
        for i in range(0, len(self.batches), at_once):
            part = self.batches[i : i + at_once]
            run(graph, part, weights=strands.fetch, observers=observers, progress=self.progress, stage=stage)

    def _restored(self) -> list[Losses]:
        found = [Losses() for _ in self.dense.structure.layers]
        strands, observers = restorations(self.dense, self.pruned, lambda layer: found[layer].add)
        self._run(strands, observers, "restore layers")
        return found

    def _layer(self, path: str) -> int | None:
        layers = self.dense.structure.layers
        return next((i for i, p in enumerate(layers) if path == p or path.startswith(p + ".")), None)

    def _node(self, seen: _Seen) -> Node:
        node = seen.thread.node
        shapes = seen.free.shapes
        note = f"shape {shapes[1]}, expected {shapes[0]}" if shapes else "" if seen.free.finite else "NaN or infinity"
        return Node(
            name=node.name,
            pruned=seen.thread.pruned.name,
            operator=operator_name(node),
            module=module_path(node),
            layer=self._layer(module_path(node)),
            error=seen.free.error,
            cosine=seen.free.cosine,
            own=seen.own.error if self.known else None,
            lossy=seen.thread.lossy,
            note=note,
        )

    def _sites(self, seen: Sequence[_Seen]) -> list[Projection]:
        by_node = {s.thread.node.name: s for s in seen}
        sites = [s for s in self.dense.structure.sites if s.node in by_node]
        return [_projection(s, by_node[s.node], by_node.get(s.reads), tolerance(self.pruned.graph)) for s in sites]

    def _layers(self, seen: Sequence[_Seen], restored: Sequence[Losses], kl: float) -> list[Layer]:
        by_node = {s.thread.node.name: s for s in seen}
        found = []
        for layer, (_, after) in enumerate(self.dense.structure.boundaries()):
            at = by_node.get(after)
            means = restored[layer].mean() if restored else None
            found.append(
                Layer(
                    layer=layer,
                    path=self.dense.structure.layers[layer],
                    error=at.free.error if at else math.nan,
                    cosine=at.free.cosine if at else math.nan,
                    kl=means[0] if means else None,
                    cross_entropy=means[2] if means else None,
                    gain=kl - means[0] if means else None,
                )
            )
        return found


def _projection(site: Site, seen: _Seen, reads: _Seen | None, rounding: float) -> Projection:
    own = seen.own.error
    bare = seen.bare.error if seen.thread.masked is not None else None
    suspect = None
    blameless = reads is not None and not reads.own.error <= rounding  # what it reads is wrong already
    if bare is not None and not blameless and not own <= _SUSPECT * bare + _NOTHING:
        suspect = f"its refit is worse than none: error {own:.3g}, without refit {bare:.3g}"
    return Projection(
        site.name, site.kind, site.layer, site.node, seen.free.error, seen.free.cosine, own, bare, suspect
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _adding(distance: Distance, kept: dict[int, Tensor]) -> Callable[[Tensor, Tensor], None]:
    return lambda expected, found: distance.add(expected, found, kept)


def _check_alike(dense: Opened, pruned: Opened) -> None:
    if type(dense.model) is not type(pruned.model):
        raise ModelError(
            f"{dense.name} is a {type(dense.model).__name__} and {pruned.name} a {type(pruned.model).__name__}; "
            "expected a model and one pruned from it"
        )
    if len(dense.structure.layers) != len(pruned.structure.layers):
        raise ModelError(
            f"{dense.name} has {len(dense.structure.layers)} layers and {pruned.name} {len(pruned.structure.layers)}; "
            "expected equally many: only models whose layers correspond can be compared"
        )
    bigger = _grown(dense, pruned)
    if bigger:
        raise PlanError(
            f"{bigger} is larger in {pruned.name} than in {dense.name}; expected a model and one pruned from it: give "
            "the dense one first"
        )


def _reshaped(dense: Opened, pruned: Opened) -> bool:
    """Whether some parameter has another shape."""
    old = dict(dense.model.named_parameters())
    return any(name in old and old[name].shape != p.shape for name, p in pruned.model.named_parameters())


def _grown(dense: Opened, pruned: Opened) -> str | None:
    """The first parameter that is larger in the pruned model, or None."""
    old = dict(dense.model.named_parameters())
    return next((k for k, p in pruned.model.named_parameters() if k in old and p.numel() > old[k].numel()), None)


def _batches(dense: Opened, pruned: Opened, tokens: Tensor, seq_len: int, batch: int) -> list[Tensor]:
    rows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    fixed = is_static(dense.graph) or is_static(pruned.graph)
    return list(torch.split(rows, fixed[0] if fixed else batch))
