"""A model opened for looking at: its graph and groups from the configuration alone, its weights one at a time.

A checkpoint in a directory is traced on the meta device, and its weights are read from the safetensors files when they
are asked for, so that models larger than memory can be compared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, fx, nn

from slimgraph import hf
from slimgraph.errors import CheckpointError, ModelError
from slimgraph.execute import Weights
from slimgraph.groups import Structure, infer
from slimgraph.manifest import Manifest
from slimgraph.plan import Plan, resolve
from slimgraph.pretrained import load_model
from slimgraph.trace import canonical_names, retarget, tensor_at, trace
from slimgraph.weightfiles import stored_tensors, weight_files

__all__ = ["Opened", "open_model", "original", "parameters_of", "plan_between", "skipped_in", "without_layers"]

_LOG = logging.getLogger(__name__)

_STATIC_SHAPE = (1, 16)  # (batch, tokens) for models that cannot be traced with free ones

Source = str | Path | nn.Module
"""A model in memory, or the directory or hub name of one."""


@dataclass(frozen=True)
class Opened:
    """A traced model.

    Attributes:
        name: what to call it: its directory, its name on the hub, or its class.
        model: the module; on the meta device when its weights are read from files.
        structure: groups, sites and layers of its graph.
        weights: fetches parameters and buffers by the graph's names.
        manifest: how it was pruned; None for a model that was not.
        device: where the weights are put.
    """

    name: str
    model: nn.Module
    structure: Structure
    weights: Weights
    manifest: Manifest | None
    device: torch.device

    @property
    def graph(self) -> fx.GraphModule:
        """The traced graph."""
        return self.structure.analysis.graph_module


def open_model(
    source: Source | Opened,
    *,
    values: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    shape: tuple[int, int] = _STATIC_SHAPE,
    trust_remote_code: bool = False,
) -> Opened:
    """Open a model, pruned or not.

    Args:
        source: a model in memory, or the directory or hub name of one; what is open already stays as it is.
        values: whether weights will be asked for; without, only the configuration is read.
        dtype: of the weights that are read; a model in memory keeps its own.
        device: where they go; a model in memory stays where it is.
        shape: (batch, tokens) for a model that cannot be traced with free ones.
        trust_remote_code: let the checkpoint bring its own modeling code.

    Raises:
        ModelError: there is no such model, or it cannot be run; the message names the module that fails.
        CheckpointError: its weight files are missing or damaged.
    """
    if isinstance(source, Opened):
        return source
    if isinstance(source, nn.Module):
        structure = infer(_traced(source, type(source).__name__, shape))
        device = next(source.parameters()).device
        return Opened(type(source).__name__, source, structure, _own(structure), _manifest(source), device)
    name = str(source)
    model = load_model(source, meta=True, dtype=dtype, trust_remote_code=trust_remote_code)
    graph = _traced(model, name, shape)
    structure = infer(graph)
    manifest = _manifest(model)
    if not values:
        return Opened(name, model, structure, _none_of(name), manifest, torch.device("meta"))
    fetch = _from_files(Path(source).expanduser(), model, graph, dtype, torch.device(device))
    if fetch is None:
        _LOG.info("%s: its files hold other tensors than the model; loading it whole", name)
        whole = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return open_model(whole, shape=shape)
    retarget(graph, device)
    return Opened(name, model, structure, fetch, manifest, torch.device(device))


def plan_between(dense: Manifest | None, pruned: Manifest | None) -> Plan | None:
    """Which units of one model stay in another that was made from it, by their manifests; None where none says it.

    Args:
        dense: of the model before; None for one that was not pruned.
        pruned: of the model after.

    Raises:
        PlanError: the one was not made from the other.
    """
    if pruned is None:
        return None
    whole = Plan.from_dict(pruned.plan)
    return whole if dense is None else whole.since(Plan.from_dict(dense.plan))


def skipped_in(dense: Opened, pruned: Opened, plan: Plan | None = None) -> tuple[str, ...]:
    """Layers that a pruned model skips, by its manifest or a plan, and the dense one does not."""
    known = {*(pruned.manifest.skipped if pruned.manifest else ()), *(plan.skipped if plan else ())}
    return tuple(path for path in dense.structure.layers if path in known and path not in pruned.structure.layers)


def without_layers(dense: Opened, layers: tuple[str, ...]) -> Opened:
    """The dense model with the graph without these layers, in which the cuts of a pruned one were made.

    Raises:
        PlanError: the layers cannot be skipped.
    """
    return replace(dense, structure=resolve(dense.structure, Plan(skipped=layers)).structure) if layers else dense


def original(model: nn.Module) -> nn.Module:
    """The class of a pruned model as its configuration builds it, before any pruning, on the meta device.

    Args:
        model: a pruned or ordinary transformers model.

    Raises:
        ModelError: the model has no configuration to build from.
    """
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:
        raise ModelError(
            f"{type(model).__name__} has no configuration, so that its original cannot be built; give the dense model"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = next(model.parameters()).dtype
    with torch.device("meta"):
        built: nn.Module = type(model)(config)
    return built.to(dtype).eval()


def parameters_of(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter by its first name; tied ones count once."""
    return {name: list(p.shape) for name, p in model.named_parameters()}


def _manifest(model: nn.Module) -> Manifest | None:
    entry = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(entry, dict) and entry.get("quant_method") == hf.METHOD:  # as read from a file
        return hf.SlimgraphConfig(**entry).manifest
    return hf.manifest_of(model)


def _traced(model: nn.Module, name: str, shape: tuple[int, int]) -> fx.GraphModule:
    try:
        return trace(model, shape=shape)
    except ModelError as error:
        failing = _failing_module(model, shape)
        if failing is None:
            raise
        path, reason = failing
        owner = model.get_submodule(path)
        sizes = {k: v for k, v in vars(owner).items() if type(v) is int and not k.startswith("_")}
        held = ", ".join(f"{k} = {v}" for k, v in sizes.items()) or "none"
        raise ModelError(
            f"{name} cannot be run: {path or 'the model'} ({type(owner).__name__}) fails: {reason}. A stale attribute "
            f"is the usual cause; its sizes are: {held}"
        ) from error


def _failing_module(model: nn.Module, shape: tuple[int, int]) -> tuple[str, str] | None:
    """The innermost module that fails when the model is traced again, and the message; None when none does."""
    running: list[str] = []
    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(_entering(running, path)))
        hooks.append(module.register_forward_hook(_leaving(running)))
    try:
        trace(model, shape=shape)
    except ModelError as error:
        cause = error.__cause__ or error
        return (running[-1], str(cause).strip().splitlines()[0].rstrip(".")) if running else None
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _entering(running: list[str], path: str) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        if path == "":  # another attempt
            running.clear()
        running.append(path)

    return enter


def _leaving(running: list[str]) -> Callable[..., None]:
    def leave(*_: Any) -> None:
        running.pop()

    return leave


def _own(structure: Structure) -> Weights:
    return lambda name: tensor_at(structure.analysis.graph_module, name).detach()


def _none_of(name: str) -> Weights:
    def refuse(parameter: str) -> Tensor:
        raise ModelError(f"{name} was opened without weights, {parameter} was asked for; open it with values=True")

    return refuse


def _from_files(
    path: Path,
    model: nn.Module,
    graph: fx.GraphModule,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights | None:
    """A function that reads tensors when asked; None when the files do not hold all of them under the model's names."""
    if not path.is_dir():
        return None
    stored = stored_tensors(weight_files(path))
    names: dict[str, list[str]] = {}
    for name, canonical in canonical_names(model).items():
        names.setdefault(canonical, []).append(name)
    buffers = _computed_buffers(model)
    places: dict[str, tuple[Path, str]] = {}
    computed: dict[str, Tensor] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        name, shape = str(node.target), list(node.meta["val"].shape)
        found = next((n for n in names.get(name, [name]) if n in stored), None)
        if found is not None and stored[found].shape == shape:
            places[name] = (stored[found].file, found)
        elif name in buffers and list(buffers[name].shape) == shape:
            computed[name] = buffers[name]
        else:
            return None
    return _reader(places, computed, dtype, device)


def _reader(
    places: Mapping[str, tuple[Path, str]], computed: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Weights:
    files = {file: safe_open(file, framework="pt") for file, _ in places.values()}

    def fetch(name: str) -> Tensor:
        if name in computed:
            return computed[name].to(device)
        if name not in places:
            raise CheckpointError(f"no tensor {name!r} in the weight files; expected one of the model's own names")
        file, stored_as = places[name]
        tensor: Tensor = files[file].get_tensor(stored_as)  # type: ignore[no-untyped-call]
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return fetch


def _computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the class computes when it is built: frequencies, tables. No weights are made."""
    if getattr(model, "config", None) is None:
        return {}
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        built = type(model)(config)
    return {name: b for name, b in built.named_buffers() if not b.is_meta}
