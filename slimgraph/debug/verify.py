"""Every invariant of a pruned checkpoint, checked one after the other; what fails does not stop the rest."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from slimgraph import checkpoint, hf
from slimgraph.debug.opened import open_model, original, plan_between
from slimgraph.errors import SlimgraphError
from slimgraph.groups import Structure, infer
from slimgraph.invariants import check_graph, check_masked, differing_parameters
from slimgraph.manifest import Manifest
from slimgraph.module import agreement, tolerance
from slimgraph.plan import Plan, resolve
from slimgraph.pretrained import check_finite, load_model
from slimgraph.progress import SILENT, Progress
from slimgraph.trace import canonical_names, probe, trace
from slimgraph.weightfiles import check_stored, stored_tensors, weight_files

__all__ = ["Check", "Verification", "verify"]

_NEW_TOKENS = 8
_STATIC_SHAPE = (1, 16)


class _NotApplicableError(Exception):
    """A check that does not apply; the message says why."""


@dataclass(frozen=True)
class Check:
    """One invariant.

    Attributes:
        name: which.
        passed: whether it holds; None when it does not apply.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, repr=False)
class Verification:
    """All invariants of a checkpoint; prints as text, and as HTML in notebooks."""

    checkpoint: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [c for c in self.checks if c.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "ok": self.ok}

    def __repr__(self) -> str:
        width = max((len(c.name) for c in self.checks), default=0)
        lines = [f"{_word(c).ljust(7)}  {c.name.ljust(width)}  {c.detail}".rstrip() for c in self.checks]
        return "\n".join([*lines, f"{self.checkpoint}: {_verdict(self)}"])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{_word(c)}</td><td>{html.escape(c.name)}</td><td style='text-align:left'>"
            f"{html.escape(c.detail)}</td></tr>"
            for c in self.checks
        )
        return f"<p><b>{html.escape(self.checkpoint)}</b>: {_verdict(self)}</p><table>{rows}</table>"


def verify(
    directory: str | Path,
    *,
    against: str | Path | nn.Module | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Check a checkpoint.

    Args:
        directory: of the checkpoint, pruned or ordinary.
        against: the model that it was pruned from, the first one or one in between, for masked equivalence.
        trust_remote_code: let checkpoints bring their own modeling code.
        progress: shows what is being checked.

    Raises:
        CheckpointError: there is no checkpoint at all.
        ModelError: `against` cannot be loaded.
    """
    manifest = checkpoint.load_manifest(directory)
    run = _Checks(Path(directory), manifest, against, trust_remote_code)
    found = []
    for name, check in run.everything():
        with (progress or SILENT)(name):
            found.append(_outcome(name, check))
    return Verification(str(directory), tuple(found))


def _outcome(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except _NotApplicableError as reason:
        return Check(name, None, str(reason))
    except SlimgraphError as error:
        return Check(name, False, str(error))
    except Exception as error:  # a damaged model may fail in any way
        return Check(name, False, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")


class _Checks:
    def __init__(
        self, path: Path, manifest: Manifest | None, against: str | Path | nn.Module | None, trust_remote_code: bool
    ) -> None:
        self.path, self.manifest, self.against, self.trust = path, manifest, against, trust_remote_code
        self.model: nn.Module | None = None
        self.graph: fx.GraphModule | None = None
        self.dense: tuple[Structure, Plan] | None = None

    def everything(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "files", self.files
        yield "loads", self.loads
        yield "finite", self.finite
        yield "tied", self.tied
        yield "manifest", self.manifest_fits
        yield "plan", self.plan_fits
        yield "graph", self.graph_sound
        yield "graph = module", self.graph_is_module
        yield "cache", self.cache
        yield "slices", self.slices
        yield "masked equivalence", self.masked

    def files(self) -> str:
        """The weight files are whole and hold what the manifest says."""
        stored = stored_tensors(weight_files(self.path))
        if self.manifest is None:
            return f"{len(stored)} tensors; no manifest: not pruned by slimgraph"
        with torch.device("meta"):
            empty = load_model(self.path, meta=True, trust_remote_code=self.trust)
        check_stored(stored, self.manifest.stored_shapes(), hf.tied_names(empty))
        return f"{len(stored)} tensors, {len(self.manifest.stored_shapes())} of them as the manifest says"

    def loads(self) -> str:
        """Every weight of the model comes from the files, and the other way round."""
        self.model = checkpoint.load(self.path, trust_remote_code=self.trust)
        self.model.eval()
        count = sum(p.numel() for p in self.model.parameters())
        return f"{type(self.model).__name__} with {count:,} parameters in {next(self.model.parameters()).dtype}"

    def finite(self) -> str:
        """No weight or buffer is NaN or infinite."""
        model = self._model()
        check_finite(model)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
                raise SlimgraphError(f"the buffer {name} holds NaN or infinity; the checkpoint is damaged")
        return "no NaN or infinity"

    def tied(self) -> str:
        """What the class ties is one tensor."""
        model = self._model()
        pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        first = canonical_names(model)
        for one, other in pairs.items():
            if first.get(one) != first.get(other):
                raise SlimgraphError(f"{one} and {other} are two tensors, {type(model).__name__} ties them")
        return ", ".join(f"{one} is {other}" for one, other in pairs.items()) or "nothing is tied"

    def manifest_fits(self) -> str:
        """The manifest leads from the class, as built from the configuration, to this model: shapes and attributes."""
        manifest, model = self._manifest(), self._model()
        hf.verify(model, manifest)
        counts = len(manifest.shapes), len(manifest.added), len(manifest.attributes)
        return "{} shapes, {} added, attributes of {} modules".format(*counts)

    def plan_fits(self) -> str:
        """The shapes are what the plan makes of the original's."""
        manifest, model = self._manifest(), self._model()
        plan = Plan.from_dict(manifest.plan)
        structure = open_model(original(model), values=False).structure
        resolved = resolve(structure, plan)
        names = canonical_names(model)
        for name, shape in manifest.shapes.items():
            wanted = list(resolved.shape(names.get(name, name)))
            if wanted != shape:
                raise SlimgraphError(f"{name} has shape {shape}, the plan in the manifest leads to {wanted}")
        for name in resolved.selections:
            if name in names and name not in manifest.shapes and name not in manifest.buffers:
                raise SlimgraphError(f"the plan cuts {name}, the manifest lists no new shape for it")
        skipped = f", {len(plan.skipped)} layers skipped" if plan.skipped else ""
        return f"{len(plan.cuts)} groups cut{skipped}, all shapes follow"

    def graph_sound(self) -> str:
        """The traced graph is well formed, its shapes are consistent, and its axes can be analysed."""
        self.graph = trace(self._model(), shape=_STATIC_SHAPE)
        check_graph(self.graph)
        structure = infer(self.graph)
        return f"{len(self.graph.graph.nodes):,} nodes, {len(structure.layers)} layers, {len(structure.sites)} sites"

    def graph_is_module(self) -> str:
        """Graph and module give the same logits."""
        graph = self._graph()
        difference = agreement(self._model(), graph, probe(graph))
        if not difference <= tolerance(graph):
            raise SlimgraphError(
                f"logits of graph and module differ by {difference:.2g} of the largest one, expected at most "
                f"{tolerance(graph):.2g}"
            )
        return f"logits differ by {difference:.1e} of the largest one"

    def cache(self) -> str:
        """Greedy generation makes the same tokens with and without the cache of keys and values."""
        model: Any = self._model()
        if not hasattr(model, "generate"):
            raise _NotApplicableError(f"{type(model).__name__} cannot generate")
        ids = (torch.arange(6) % 17)[None].to(next(model.parameters()).device)
        options = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        scores = []
        with torch.no_grad():
            for use_cache in (True, False):
                made = model.generate(
                    ids,
                    attention_mask=mask,
                    use_cache=use_cache,
                    output_logits=True,
                    return_dict_in_generate=True,
                    **options,
                )
                scores.append(torch.stack(made.logits).double())
        scale = scores[1].abs().max().clamp(min=1e-30)
        difference = float(((scores[0] - scores[1]).abs().max() / scale).nan_to_num(math.inf))
        if not difference <= tolerance(self._graph()):
            raise SlimgraphError(f"logits with and without the cache differ by {difference:.2g} of the largest one")
        return f"{_NEW_TOKENS} tokens, logits differ by {difference:.1e} of the largest one"

    def slices(self) -> str:
        """Outside the refitted projections every weight is the dense one's slice."""
        dense, plan = self._dense()
        resolved = resolve(dense, plan)
        differing = differing_parameters(dict(self._model().named_parameters()), resolved)
        if differing:
            raise SlimgraphError(
                f"{differing[0]} and {len(differing) - 1} more are not slices of the dense weights; expected after "
                "training, else a defect: slimgraph bisect shows what it does"
            )
        return "all weights outside the refitted projections are the dense ones' slices"

    def masked(self) -> str:
        """With refits undone the model is the dense one with the removed units zeroed."""
        difference = check_masked(self._graph(), *self._dense())
        return f"refits undone, logits differ by {difference:.1e} of the largest one"

    # -- what several checks need --

    def _model(self) -> nn.Module:
        if self.model is None:
            raise _NotApplicableError("the model could not be loaded")
        return self.model

    def _graph(self) -> fx.GraphModule:
        if self.graph is None:
            raise _NotApplicableError("the model could not be traced")
        return self.graph

    def _manifest(self) -> Manifest:
        if self.manifest is None:
            raise _NotApplicableError("no manifest: not pruned by slimgraph")
        return self.manifest

    def _dense(self) -> tuple[Structure, Plan]:
        """The dense model, and which of its units stay."""
        manifest = self._manifest()
        if self.against is None:
            raise _NotApplicableError("needs the dense model (--against)")
        if self.dense is None:
            dense = self.against
            if not isinstance(dense, nn.Module):
                dtype = next(self._model().parameters()).dtype
                dense = load_model(dense, dtype=dtype, trust_remote_code=self.trust)
            plan = plan_between(hf.manifest_of(dense), manifest)
            assert plan is not None
            self.dense = infer(trace(dense, shape=_STATIC_SHAPE)), plan
        return self.dense


def _word(check: Check) -> str:
    return "skipped" if check.passed is None else "ok" if check.passed else "FAILED"


def _verdict(found: Verification) -> str:
    passed = sum(c.passed is True for c in found.checks)
    failed = len(found.failures)
    return f"{passed} checks passed, {failed} failed, {len(found.checks) - passed - failed} skipped"
