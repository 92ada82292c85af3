"""A resolved plan applied to the Hugging Face module (or any module) that was traced.

The pruned module is a copy whose unchanged tensors are shared with the original. Python attributes that hold old sizes
are found by value: an integer that a module reads in its forward pass and that equals the old size of an axis which the
module's own graph nodes carry is a candidate for the new size. Where a value fits several axes, each reading is tried
and the module is run against the pruned graph; the reading that agrees is taken. No list of architectures or attribute
names is involved.
"""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimgraph.attributes import get_attribute, integers_of, integers_read, set_attribute
from slimgraph.axes import DATA, Atom, Concat, Product, Term, size
from slimgraph.depth import outputs_of, without_layers
from slimgraph.dtypes import dtype_name
from slimgraph.errors import ModelError
from slimgraph.groups import Structure
from slimgraph.layer_config import layer_widths
from slimgraph.manifest import Manifest
from slimgraph.plan import Plan, Resolved
from slimgraph.surgery import Refit, assign
from slimgraph.trace import canonical_names, evaluating, module_path, probe, tensor_at, uncached

__all__ = ["PrunedModule", "agreement", "prune_module", "tolerance"]

_LOG = logging.getLogger(__name__)

_MOST_READINGS = 256  # combinations of attribute readings that are tried before giving up


@dataclass
class PrunedModule:
    """A pruned copy of a module, and how it differs.

    Attributes:
        module: the copy.
        shapes: tensor name -> new shape, for all names of every changed tensor that the original has.
        original_shapes: the same tensors' shapes before.
        added: name -> shape of parameters that the original does not have.
        attributes: module path -> attribute -> new value.
        difference: largest difference of logits to the pruned graph, over the largest logit.
        layer_widths: layer -> name in the configuration -> width there, where the configuration has a name for it.
        skipped: layers that are skipped, and what they return; see `slimgraph.depth.outputs_of`.
    """

    module: nn.Module
    shapes: dict[str, list[int]] = field(default_factory=dict)
    original_shapes: dict[str, list[int]] = field(default_factory=dict)
    added: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    difference: float = math.nan
    layer_widths: dict[int, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def manifest(self, plan: Plan, recipe: dict[str, Any]) -> Manifest:
        """What a checkpoint has to say about the copy, against the original module."""
        persistent = self.module.state_dict().keys()
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        return Manifest(
            shapes={k: v for k, v in self.shapes.items() if k in persistent},
            added=self.added,
            attributes={k: dict(v) for k, v in self.attributes.items()},
            buffers={
                k: {"shape": v, "dtype": dtype_name(buffers[k].dtype)}
                for k, v in self.shapes.items()
                if k not in persistent
            },
            original_shapes=self.original_shapes,
            plan=plan.to_dict(),
            recipe=recipe,
            versions={p: importlib.metadata.version(p) for p in ("slimgraph", "torch", "transformers")},
            per_layer_config=self.layer_widths,
            skipped=self.skipped,
        )


def prune_module(
    model: nn.Module, resolved: Resolved, pruned_graph: fx.GraphModule, refits: Mapping[str, Refit] | None = None
) -> PrunedModule:
    """Prune a copy of the model that a graph was traced from.

    Args:
        model: the traced model; not changed.
        resolved: the plan.
        pruned_graph: the same plan applied to the graph; its parameters are shared with the result, and its logits are
            what the result must reproduce.
        refits: site name -> new projection, as given to `slimgraph.surgery.prune_graph`.

    Raises:
        ModelError: the module cannot be made to agree with the graph; the message says where and what was tried. The
            pruned graph is unaffected.
    """
    skipped = {}
    if resolved.plan.skipped:
        skipped = outputs_of(model, resolved.plan.skipped, probe(resolved.structure.analysis.graph_module))
        model = without_layers(model, skipped)
    shared: dict[int, object] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    result = PrunedModule(copy.deepcopy(model, shared), skipped=skipped)
    _replace_tensors(model, result, pruned_graph)
    _add_biases(result, resolved.structure, pruned_graph, refits or {})
    _resize_torch_modules(result)
    with evaluating(model), evaluating(result.module):
        _fit_attributes(model, result, resolved, pruned_graph)
    result.layer_widths = layer_widths(model, resolved, result.shapes)
    return result


def agreement(module: nn.Module, graph_module: fx.GraphModule, ids: Tensor) -> float:
    """Largest difference between the logits of a module and a graph, divided by the largest logit of the graph.

    Args:
        module: of any output that is logits, or has them.
        graph_module: that gives logits.
        ids: (batch, tokens) int64.

    Returns:
        The quotient, taken in float64; inf where shapes differ or a logit is not finite.
    """
    with torch.no_grad():
        expected = graph_module(ids)
        found = uncached(module, ids)
        logits = found if isinstance(found, Tensor) else found.logits
    if logits.shape != expected.shape:
        return math.inf
    difference = (logits.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(math.inf))


def _replace_tensors(model: nn.Module, result: PrunedModule, pruned_graph: fx.GraphModule) -> None:
    new = {**dict(pruned_graph.named_parameters()), **dict(pruned_graph.named_buffers())}
    for name, canonical in canonical_names(model).items():
        if canonical not in new or new[canonical] is tensor_at(model, name):
            continue
        old, tensor = tensor_at(model, name), new[canonical]
        if isinstance(tensor, nn.Parameter):
            assign(result.module, name, tensor)
        else:
            _replace_buffer(result.module, name, tensor)
        if old.shape != tensor.shape:
            result.shapes[name] = list(tensor.shape)
            result.original_shapes[name] = list(old.shape)


def _replace_buffer(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    # Set in place of the old one, so that whether it is saved stays as it was.
    module.get_submodule(path)._buffers[leaf] = tensor


def _add_biases(
    result: PrunedModule, structure: Structure, pruned_graph: fx.GraphModule, refits: Mapping[str, Refit]
) -> None:
    for site in structure.sites:
        refit = refits.get(site.name)
        if refit is None or refit.bias is None or site.bias is not None:
            continue
        path, _, leaf = site.refit_bias.rpartition(".")
        owner = result.module.get_submodule(path)
        if leaf != "bias" or getattr(owner, "bias", owner) is not None:
            raise ModelError(
                f"{path}: recovery adds a bias here, but {type(owner).__name__} has no place for one (expected an "
                "attribute `bias` that is None). The pruned graph has it; for the module use a recovery without bias"
            )
        assign(result.module, site.refit_bias, tensor_at(pruned_graph, site.refit_bias))
        result.added[site.refit_bias] = list(refit.bias.shape)


def _resize_torch_modules(result: PrunedModule) -> None:
    """PyTorch's own layers say their sizes in attributes that follow from their weights."""
    for path, module in result.module.named_modules():
        sizes: dict[str, int] = {}
        if isinstance(module, nn.Linear):
            sizes = {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
        elif isinstance(module, nn.Embedding):
            sizes = {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}
        for attribute, n in sizes.items():
            if getattr(module, attribute) != n:
                setattr(module, attribute, n)
                result.attributes.setdefault(path, {})[attribute] = n


# -- attributes that hold old sizes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """An axis that a module's nodes carry: what it is made of (layer left out), and its size before and after."""

    role: str
    before: int
    after: int


_Key = tuple[str, str]  # module path with the layer left out, attribute


@dataclass
class _Reading:
    """One way to read an attribute: the new value on every module that has it.

    `is_axis` says whether an axis of the modules is that large afterwards.
    """

    role: str
    values: dict[str, int]
    is_axis: bool = True


def _fit_attributes(model: nn.Module, result: PrunedModule, resolved: Resolved, pruned_graph: fx.GraphModule) -> None:
    ids = probe(resolved.structure.analysis.graph_module)
    keys = _readings(model, resolved, ids)
    tried = 0
    best, best_labels = math.inf, ""
    for combination in _by_likelihood(list(keys.values())):
        if tried == _MOST_READINGS:
            break
        tried += 1
        old = _apply(result.module, dict(zip(keys, combination, strict=True)))
        difference = _agreement_or_inf(result.module, pruned_graph, ids)
        if difference <= tolerance(pruned_graph):
            result.difference = difference
            _record(result, old)
            return
        if difference < best:
            best = difference
            best_labels = ", ".join(f"{p}.{a}: {r.role}" for (p, a), r in zip(keys, combination, strict=True))
        _undo(result.module, old)
    raise ModelError(_failure_message(result.module, pruned_graph, ids, keys, tried, best, best_labels))


def _by_likelihood(readings: list[list[_Reading]]) -> Iterator[tuple[_Reading, ...]]:
    """Combinations of one reading each, those with fewest second choices first."""
    places = [range(len(r)) for r in readings]
    most = sum(len(p) - 1 for p in places)
    for rank in range(most + 1):
        for choice in _with_sum(places, rank):
            yield tuple(r[i] for r, i in zip(readings, choice, strict=True))


def _with_sum(places: list[range], total: int) -> Iterator[tuple[int, ...]]:
    if not places:
        if total == 0:
            yield ()
        return
    for i in places[0]:
        if i <= total:
            yield from ((i, *rest) for rest in _with_sum(places[1:], total - i))


def tolerance(graph_module: fx.GraphModule) -> float:
    """How closely two runs of a computation agree, relative to the largest logit: by its coarsest dtype."""
    seen = {n.meta["val"].dtype for n in graph_module.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    coarsest = max((torch.finfo(d).eps for d in seen if d.is_floating_point), default=0.0)
    return max(1e-9, min(5e-2, 1000 * coarsest))


def _agreement_or_inf(module: nn.Module, graph_module: fx.GraphModule, ids: Tensor) -> float:
    try:
        return agreement(module, graph_module, ids)
    except Exception as error:  # a module with a wrong size in an attribute may fail in any way
        _LOG.debug("a reading of the attributes does not run: %s", error)
        return math.inf


def _readings(model: nn.Module, resolved: Resolved, ids: Tensor) -> dict[_Key, list[_Reading]]:
    """For each attribute that may hold an old size, the ways to read it; those that change it come first.

    An attribute that the forward pass reads is tried in every reading. One that it does not read is changed when there
    is only one reading, for whoever looks at it later: one that changes it, and no axis that stays as large as it says.

    A number that is each module's own layer's is no size: it stays as it is, or that is tried first where it is read. A
    pass without a cache does not tell, as it is with a cache that a layer is looked up by its number.
    """
    axes = _axes_by_module(resolved)
    layers = resolved.structure.layers
    read = integers_read(model, ids)
    found: dict[_Key, list[tuple[str, dict[str, _Axis]]]] = {}
    seen: set[_Key] = set()
    sizes: set[_Key] = set()  # those that differ from the number of a layer
    for path, owner in model.named_modules():
        layer = next((p for p in layers if path == p or path.startswith(p + ".")), "")
        if isinstance(owner, (nn.Linear, nn.Embedding)):
            continue
        here = {a.role: a for a in axes.get(path, ())}
        for attribute, value in {**integers_of(owner), **read.get(path, {})}.items():
            key = (path.removeprefix(layer), attribute)
            if str(value) != layer.rpartition(".")[2]:
                sizes.add(key)
            if value < 2:
                continue
            fits = {r: a for r, a in here.items() if a.before == value}
            found.setdefault(key, []).append((path, fits))
            if attribute in read.get(path, {}):
                seen.add(key)
    readings = {key: _ordered_readings(instances) for key, instances in found.items()}
    clear = {k for k, r in readings.items() if len(r) == 2 and not r[-1].is_axis}
    for key in readings.keys() - sizes:
        readings[key].reverse()  # as it was, first
    return {k: r if k in seen else r[:1] for k, r in readings.items() if r and (k in seen or k in clear)}


def _ordered_readings(instances: list[tuple[str, dict[str, _Axis]]]) -> list[_Reading]:
    """Readings that change something, then the one that it is no size at all; nothing if only that is left."""
    roles = set.intersection(*(set(fits) for _, fits in instances))
    paths = [p for p, _ in instances]
    options = {tuple(fits[r].after for _, fits in instances): r for r in sorted(roles, reverse=True)}
    before = tuple(next(iter(fits.values())).before if fits else 0 for _, fits in instances)
    changing = [_Reading(options[o], dict(zip(paths, o, strict=True))) for o in sorted(options) if o != before]
    unchanged = _Reading("as it was", dict(zip(paths, before, strict=True)), is_axis=before in options)
    return [*changing, unchanged] if changing else []


def _axes_by_module(resolved: Resolved) -> dict[str, list[_Axis]]:
    """Every axis, with every part of it, that the nodes and parameters of a module carry."""
    structure = resolved.structure
    found: dict[str, dict[Term, _Axis]] = {}

    def note(path: str, term: Term) -> None:
        for part in _parts(term):
            at = found.setdefault(path, {})
            if part not in at and not _is_data(part):
                at[part] = _Axis(_role(structure, part), size(part), resolved.size_of(part))

    analysis = structure.analysis
    for node, dims in analysis.dims.items():
        if node.op != "call_function" or dims is None:
            continue
        for path in _within_layer(structure, module_path(node)):
            for terms in dims if isinstance(dims, list) else [dims]:
                for term in terms:
                    note(path, analysis.axes.find(term))
    for source, terms in analysis.sources.items():
        for path in _within_layer(structure, source.rpartition(".")[0]):
            for term in terms:
                note(path, analysis.axes.find(term))
    return {path: list(axes.values()) for path, axes in found.items()}


def _within_layer(structure: Structure, path: str) -> Iterator[str]:
    """A module and those around it, up to its layer; outside the layers only the module itself."""
    layer = next((p for p in structure.layers if path == p or path.startswith(p + ".")), None)
    yield path
    while layer is not None and path != layer:
        path = path.rpartition(".")[0]
        yield path


def _parts(term: Term) -> Iterator[Term]:
    """A term, its factors, products of neighbouring factors, and its parts."""
    yield term
    match term:
        case Product(factors):
            for i, j in itertools.combinations(range(len(factors) + 1), 2):
                if 1 < j - i < len(factors):
                    yield Product(factors[i:j])
            for f in factors:
                yield from _parts(f)
        case Concat(parts):
            for p in parts:
                yield from _parts(p)


def _is_data(term: Term) -> bool:
    return isinstance(term, Atom) and term.frozen == DATA


def _role(structure: Structure, term: Term) -> str:
    match term:
        case Atom():
            name = structure.atom_groups.get(term, f"{term.size}")
            layer = next((p for p in structure.layers if name.startswith(p + ".")), "")
            return name.removeprefix(layer)
        case Product(factors):
            return " × ".join(_role(structure, f) for f in factors)
        case Concat(parts):
            return "(" + " | ".join(_role(structure, p) for p in parts) + ")"


def _apply(module: nn.Module, chosen: Mapping[_Key, _Reading]) -> dict[tuple[str, str], int]:
    old: dict[tuple[str, str], int] = {}
    for (_, attribute), reading in chosen.items():
        for path, value in reading.values.items():
            owner = module.get_submodule(path)
            old[path, attribute] = get_attribute(owner, attribute)
            set_attribute(owner, attribute, value)
    return old


def _undo(module: nn.Module, old: Mapping[tuple[str, str], int]) -> None:
    for (path, attribute), value in old.items():
        set_attribute(module.get_submodule(path), attribute, value)


def _record(result: PrunedModule, old: Mapping[tuple[str, str], int]) -> None:
    for (path, attribute), before in old.items():
        now = get_attribute(result.module.get_submodule(path), attribute)
        if now != before:
            result.attributes.setdefault(path, {})[attribute] = now


def _failure_message(
    module: nn.Module,
    graph_module: fx.GraphModule,
    ids: Tensor,
    keys: Mapping[_Key, list[_Reading]],
    tried: int,
    best: float,
    best_labels: str,
) -> str:
    try:
        agreement(module, graph_module, ids)
        problem = f"its logits differ from the graph's by {best:.2g} of the largest logit"
    except Exception as error:
        problem = f"it does not run ({str(error).strip().splitlines()[0]})"
    what = "; ".join(f"{p or '(layer)'}.{a}" for p, a in keys) or "no attribute holds an old size"
    return (
        f"{type(module).__name__}: the module with sliced weights does not agree with the pruned graph: {problem}. "
        f"Tried {tried} readings of the attributes that may hold old sizes ({what}); closest: {best_labels or 'none'}. "
        "The pruned graph itself is sound and can be used"
    )
