"""What a model costs: parameters, multiplications per token, bytes of its weights and of its cache.

Everything follows from the traced graph and from what the model's own forward pass returns, never from a
configuration or a name, so that layers of different widths are counted as they are. Nothing is computed with weights:
shapes suffice, and a model on the meta device costs the same as one in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from slimgraph.errors import CheckpointError, ModelError
from slimgraph.trace import is_static, retarget, trace
from slimgraph.weightfiles import weight_files

__all__ = ["Cost", "OnShapes", "cache_bytes", "checkpoint_bytes", "cost", "macs", "weight_bytes"]

_CACHE_LENGTHS = (4, 8)  # tokens; short, so that a cache with a window has not reached it


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: number of them; tied ones count once.
        weight_bytes: of parameters and saved buffers, in the dtype that the model has.
        macs_per_token: multiply-accumulates of all contractions for one token of a prompt of `tokens`, the output
            projection for every token included. Attention counts all pairs of tokens, as an unmasked product would.
        tokens: length of that prompt.
        cache_bytes_per_token: by which the cache grows with each token of one sequence, in the model's dtype; None for
            a model without a cache.
        cache_bytes_fixed: what a cache holds whatever the length, as state-space layers do; None without a cache.
    """

    parameters: int
    weight_bytes: int
    macs_per_token: float
    tokens: int
    cache_bytes_per_token: float | None
    cache_bytes_fixed: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def cost(model: nn.Module, *, tokens: int = 128) -> Cost:
    """What a causal language model costs, from its graph and its shapes.

    Args:
        model: any that `slimgraph.trace.trace` can trace, with values or on the meta device; not changed.
        tokens: length of the prompt that `macs_per_token` is for.

    Raises:
        ModelError: the model cannot be traced, or its graph cannot be run on shapes alone.
    """
    graph = trace(model, shape=(1, tokens))
    length = (is_static(graph) or (1, tokens))[1]
    cached = cache_bytes(model)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=weight_bytes(model),
        macs_per_token=macs(graph, length) / length,
        tokens=length,
        cache_bytes_per_token=None if cached is None else cached[0],
        cache_bytes_fixed=None if cached is None else cached[1],
    )


def macs(graph_module: fx.GraphModule, tokens: int, batch: int = 1) -> int:
    """Multiply-accumulates of one forward pass: of matrix products, convolutions and attention.

    The graph is run on shapes alone, and every ATen contraction that it comes down to is counted by the formulas of
    `torch.utils.flop_counter`. Sums, norms and activation functions are left out, as is the custom.

    Args:
        graph_module: as made by `slimgraph.trace.trace`; not changed.
        tokens: length of the sequences; a graph for a fixed shape takes its own.
        batch: number of sequences.

    Raises:
        ModelError: the graph needs values to run, not only shapes.
    """
    with FlopCounterMode(display=False) as counter:
        OnShapes(graph_module).count(tokens, batch)
    return int(counter.get_total_flops()) // 2  # a multiply-accumulate counts as two operations there


class OnShapes(fx.Interpreter):
    """Runs a graph with shapes alone: on the meta device, weights made as they are read.

    Args:
        graph_module: as made by `slimgraph.trace.trace`; not changed, and its weights are shared.
        look: called with every node that `names` has, and its value.
        names: of nodes.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        look: Callable[[fx.Node, Tensor], None] | None = None,
        names: Container[str] = (),
    ) -> None:
        own = fx.Graph()
        own.output(own.graph_copy(graph_module.graph, {}))
        on_meta = fx.GraphModule(graph_module, own)
        retarget(on_meta, "meta")
        super().__init__(on_meta)
        self._shape = is_static(graph_module)
        self._what = type(graph_module).__name__
        self._look, self._names = look, names

    def count(self, tokens: int, batch: int = 1) -> None:
        """Run on sequences of so many tokens; a graph for a fixed shape takes its own.

        Raises:
            ModelError: the graph needs values to run, not only shapes.
        """
        shape = self._shape or (batch, tokens)
        try:
            with torch.no_grad():
                self.run(torch.zeros(shape, dtype=torch.long, device="meta"))
        except (RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"what {self._what} takes cannot be counted: its graph does not run on shapes alone ({reason}); "
                "expected one whose sizes do not depend on values"
            ) from error

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and show it to whoever looks."""
        value = super().run_node(n)
        if self._look is not None and n.name in self._names:
            self._look(n, value)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A weight, on the meta device."""
        value = super().get_attr(target, args, kwargs)
        return value.to("meta") if isinstance(value, Tensor) else value


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and saved buffers; what is shared counts once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def checkpoint_bytes(directory: str | Path) -> int | None:
    """Bytes of the weight files of a checkpoint; None for what is not a directory with safetensors files."""
    path = Path(directory).expanduser()
    if not path.is_dir():
        return None
    try:
        return sum(file.stat().st_size for file in weight_files(path))
    except CheckpointError:
        return None


def cache_bytes(model: nn.Module) -> tuple[float, float] | None:
    """What a model's cache takes for one sequence, seen by running it on two short ones.

    The cache may be of any class: the bytes of all tensors that can be reached from it count. Layers of different
    widths, shared caches and states of a fixed size come out as they are. A sliding window is not reached by the short
    sequences: the growth is that of the first tokens.

    Args:
        model: called with `input_ids` and `use_cache=True`; on the meta device nothing is computed.

    Returns:
        Bytes per token and bytes whatever the length, or None when the model returns no cache.
    """
    first, second = _CACHE_LENGTHS
    sizes = [_cached_bytes(model, n) for n in _CACHE_LENGTHS]
    if sizes[0] is None or sizes[1] is None:
        return None
    growth = (sizes[1] - sizes[0]) / (second - first)
    return growth, sizes[0] - growth * first


@torch.no_grad()
def _cached_bytes(model: nn.Module, tokens: int) -> int | None:
    device = next(model.parameters()).device
    try:
        output = model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device), use_cache=True)
    except TypeError:  # takes no such argument
        return None
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        cache = getattr(output, "cache_params", None)
    if cache is None:
        return None
    found = {id(t): t for t in _tensors(cache, set())}
    return sum(t.numel() * t.element_size() for t in found.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from a value through containers and attributes."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, type, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for each in inner:
        yield from _tensors(each, seen)
