"""Model in, graph out: `torch.export` of a causal language model into a plain `torch.fx` graph module.

The result takes `input_ids` (batch, tokens) int64 and returns the logits (batch, tokens, vocabulary). Parameters and
buffers are `get_attr` nodes whose targets are the model's own names, so that the graph module is an ordinary module
that any `torch.fx` pass can work on. Shapes suffice for tracing: weights may be real, fake or on the meta device, and
are shared with the model, never copied.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx.node import map_aggregate

from slimgraph.errors import GraphError, ModelError

__all__ = [
    "call",
    "canonical_names",
    "evaluating",
    "is_static",
    "module_path",
    "probe",
    "retarget",
    "tensor_at",
    "trace",
    "uncached",
]

_LOG = logging.getLogger(__name__)

_WRAPPED = "wrapped"  # name of the traced model inside `_Logits`; stripped from every name in the graph


class _Logits(nn.Module):
    """The model as a function from token ids to logits, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(_WRAPPED, model)
        accepted = inspect.signature(model.forward).parameters
        self._options = {k: v for k, v in {"use_cache": False, "return_dict": True}.items() if k in accepted}

    def forward(self, input_ids: Tensor) -> Tensor:
        out = self.get_submodule(_WRAPPED)(input_ids=input_ids, **self._options)
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ModelError(
                f"{type(self.get_submodule(_WRAPPED)).__name__} is not a causal language model: called with input_ids "
                f"it returned {type(out).__name__} without logits of shape (batch, tokens, vocabulary)"
            )
        return logits


def trace(model: nn.Module, *, shape: tuple[int, int] | None = None) -> fx.GraphModule:
    """Trace a causal language model.

    Args:
        model: any module that maps `input_ids` to logits or to an output with `.logits`. Not changed; its training flag
            is put back.
        shape: (batch, tokens) to fall back on when the model cannot be traced with free batch and length; the graph
            then works for this shape only. Without it such a model is an error.

    Returns:
        A graph module that shares its parameters with the model.

    Raises:
        ModelError: the model is not a causal language model, or `torch.export` cannot trace it (its message is quoted).
    """
    wrapped = _Logits(model)
    with evaluating(model), _experts_as_batches(model):
        try:
            exported = _export(wrapped, _example_shape(model), free=True)
        except ModelError:
            raise
        except Exception as error:
            if shape is None:
                raise ModelError(_trace_message(model, error)) from error
            _LOG.info("free batch and length: %s; tracing again for %s only", _first_line(error), shape)
            try:
                exported = _export(wrapped, shape, free=False)
            except Exception as second:
                raise ModelError(_trace_message(model, second)) from second
    if any(_mutates(node) for node in exported.graph.nodes):
        exported = exported.run_decompositions({})
    return _plain_graph_module(exported, model)


def is_static(graph_module: fx.GraphModule) -> tuple[int, int] | None:
    """(batch, tokens) when the graph works for this shape only, else None."""
    (ids,) = (n for n in graph_module.graph.nodes if n.op == "placeholder")
    batch, tokens = ids.meta["val"].shape
    return (batch, tokens) if isinstance(batch, int) and isinstance(tokens, int) else None


def retarget(graph_module: fx.GraphModule, device: torch.device | str) -> None:
    """Make every node that names a device name this one, in place. A trace on meta tensors names the meta device."""
    wanted = torch.device(device)

    def moved(value: Any) -> Any:
        return wanted if isinstance(value, torch.device) else value

    for node in graph_module.graph.nodes:
        node.args = map_aggregate(node.args, moved)
        node.kwargs = map_aggregate(node.kwargs, moved)
    graph_module.recompile()


def probe(graph_module: fx.GraphModule) -> Tensor:
    """(batch, tokens) int64: a few tokens that every vocabulary has, of a shape that the graph takes."""
    (ids,) = graph_module.graph.find_nodes(op="placeholder")
    fixed = [n if isinstance(n, int) else d for n, d in zip(ids.meta["val"].shape, (2, 9), strict=True)]
    device = next(graph_module.parameters()).device
    return (torch.arange(fixed[0] * fixed[1]) % 17).view(fixed[0], fixed[1]).to(device)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that dotted name.

    Raises:
        GraphError: something else has that name.
    """
    path, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(path), leaf)
    if not isinstance(value, Tensor):
        raise GraphError(f"{name} is a {type(value).__name__}, expected a parameter or buffer")
    return value


def uncached(model: nn.Module, ids: Tensor) -> Any:
    """What a model makes of (batch, tokens) int64, without a cache where it would keep one: as it is traced."""
    accepted = inspect.signature(model.forward).parameters
    more = any(p.kind is p.VAR_KEYWORD for p in accepted.values()) and hasattr(model, "config")
    return model(input_ids=ids, **({"use_cache": False} if more or "use_cache" in accepted else {}))


def call(node: fx.Node, look: Callable[[fx.Node], Any]) -> Any:
    """What a call_function node computes, given the values of the nodes it reads.

    Raises:
        GraphError: it is a node of another kind.
    """
    if not callable(node.target):
        raise GraphError(f"{node.name}: found a {node.op} node; expected a call of an operator")
    return node.target(*fx.map_arg(node.args, look), **fx.map_arg(node.kwargs, look))


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name -> the first name of the same tensor: tied weights are one parameter."""
    first: dict[int, str] = {}
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(id(tensor), name) for name, tensor in everything}


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made the node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple)]
    return _unwrapped(paths[-1]) if paths else ""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients and without warnings, for as long as the context lasts."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's and the model's own; none of them is ours to act on
            yield
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def _experts_as_batches(model: nn.Module) -> Iterator[None]:
    """Let `transformers` run the experts of a mixture as one batched product: fused kernels are opaque in a graph."""
    choose = getattr(model, "set_experts_implementation", None)
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if choose is None or before is None:
        yield
        return
    try:
        choose("batched_mm")
    except ValueError:  # a model that has no experts to choose for
        yield
        return
    try:
        yield
    finally:
        choose(before)


def _example_shape(model: nn.Module) -> tuple[int, int]:
    # Distinct primes that divide no dimension of the model: a size in a view then says which axes it is made of.
    sizes = {n for p in model.parameters() for n in p.shape}
    tokens = next((p for p in (11, 13, 17, 19, 23, 29, 31) if all(n % p for n in sizes)), 37)
    batch = next((p for p in (3, 5, 7, 11, 13, 17, 19) if p != tokens and all(n % p for n in sizes)), 41)
    return batch, tokens


def _export(wrapped: _Logits, shape: tuple[int, int], *, free: bool) -> ExportedProgram:
    device = next(wrapped.parameters()).device
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    dims = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}} if free else None
    return export(wrapped, (ids,), dynamic_shapes=dims, strict=False)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _plain_graph_module(exported: ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """Inputs that are weights become attributes under the model's own names; assertions go."""
    graph = exported.graph
    same = canonical_names(model)
    weights: dict[str, Tensor] = {}
    inputs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "placeholder" and inputs[node.name].kind != InputKind.USER_INPUT:
            target = inputs[node.name].target
            tensor = exported.constants.get(target)
            name = _unwrapped(target)
            name = same.get(name, name)
            weights[name] = tensor_at(model, name) if name in same else tensor
            if node.users:
                # Where it is first needed: a run that fetches weights as it goes then holds few at a time.
                with graph.inserting_before(min(node.users, key=order.__getitem__)):
                    attribute = graph.create_node("get_attr", name)
                attribute.meta = dict(node.meta)
                node.replace_all_uses_with(attribute)
            graph.erase_node(node)
        elif node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
    (output,) = (n for n in graph.nodes if n.op == "output")
    output.args = (output.args[0][0],)
    result = fx.GraphModule(weights, graph, type(model).__name__)
    result.graph.eliminate_dead_code()
    result.delete_all_unused_submodules()
    result.recompile()
    return result.eval()


def _unwrapped(name: str) -> str:
    return name.removeprefix(_WRAPPED).removeprefix(".")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _trace_message(model: nn.Module, error: BaseException) -> str:
    return (
        f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {_first_line(error)}. "
        "Data-dependent Python control flow in the model's forward is the usual cause"
    )
