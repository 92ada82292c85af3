"""The whole way: a model and calibration tokens in, a pruned model out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn

from slimgraph import checkpoint
from slimgraph.budget import Budget
from slimgraph.errors import CalibrationError, ModelError, SlimgraphError
from slimgraph.groups import Structure, infer
from slimgraph.manifest import Manifest
from slimgraph.module import PrunedModule, prune_module
from slimgraph.passes import Pass
from slimgraph.plan import Plan, resolve
from slimgraph.progress import SILENT, Progress, Stopwatch
from slimgraph.recipe import Recipe, method
from slimgraph.state import State, attach, state_of
from slimgraph.trace import trace

__all__ = ["Result", "prune", "run_passes"]


@dataclass
class Result:
    """A pruned model.

    Attributes:
        model: the pruned module, of the same class as the original; None when only the graph could be pruned.
        graph: the pruned graph.
        structure: groups and sites of the dense model.
        plan: which units stay.
        budget: how many, and what that comes to in parameters; None for a recipe without allocation.
        recipe: what made it, with the calibration settings.
        seconds: by stage.
        similarity: cosine similarity of input and output per layer, when it was measured.
        module_failure: why `model` is None.
    """

    model: nn.Module | None
    graph: fx.GraphModule
    structure: Structure
    plan: Plan
    budget: Budget | None
    recipe: dict[str, Any]
    seconds: dict[str, float]
    similarity: list[float] | None
    module_failure: str | None
    _pruned: PrunedModule | None
    parameters_before: int

    @property
    def parameters_after(self) -> int:
        """Parameters of the pruned model."""
        return sum(p.numel() for p in (self.model or self.graph).parameters())

    def manifest(self) -> Manifest:
        """What the checkpoint says about itself.

        Raises:
            ModelError: only the graph could be pruned.
        """
        if self._pruned is None:
            raise ModelError(self.module_failure or "the module was not pruned")
        persistent = self._pruned.module.state_dict().keys()
        shapes = {k: v for k, v in self._pruned.shapes.items() if k in persistent}
        buffers = {
            k: {"shape": v, "dtype": str(dict(self._pruned.module.named_buffers())[k].dtype).removeprefix("torch.")}
            for k, v in self._pruned.shapes.items()
            if k not in persistent
        }
        return Manifest(
            shapes=shapes,
            added=self._pruned.added,
            attributes={k: dict(v) for k, v in self._pruned.attributes.items()},
            buffers=buffers,  # type: ignore[arg-type]
            original_shapes=self._pruned.original_shapes,
            plan=self.plan.to_dict(),
            recipe=self.recipe,
            versions={
                "slimgraph": importlib.metadata.version("slimgraph"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        )

    def save(self, directory: str | Path, *, tokenizer: Any = None, force: bool = False) -> Path:
        """Write an ordinary checkpoint; see `slimgraph.checkpoint.save`."""
        if self.model is None:
            raise ModelError(self.module_failure or "the module was not pruned")
        return checkpoint.save(self.model, Path(directory), self.manifest(), tokenizer=tokenizer, force=force)


def prune(
    model: nn.Module,
    calibration: Tensor | Sequence[Sequence[int]],
    ratio: float = 0.2,
    *,
    recipe: Recipe | str = "slimllm",
    heads: str = "auto",
    round_to: int = 8,
    batch: int = 8,
    seed: int = 0,
    notes: dict[str, Any] | None = None,
    progress: Progress | None = None,
    watch: Stopwatch | None = None,
) -> Result:
    """Make a causal language model smaller.

    Args:
        model: any causal language model that `torch.export` can trace; not changed.
        calibration: token ids (samples, tokens) int64.
        ratio: share of all parameters that goes; ignored when `recipe` is a `Recipe`.
        recipe: a `Recipe`, or the name of a method: "slimllm", "magnitude", "wanda" or "random".
        heads: "kv", "balanced" or "auto": what goes under grouped-query attention.
        round_to: kept channels are a multiple of this.
        batch: samples that go through the model at once.
        seed: of random scores.
        notes: kept in the result's recipe, beside the passes.
        progress: shows what is going on; quiet by default.
        watch: collects seconds by stage.

    Returns:
        The pruned model and graph.

    Raises:
        ModelError: the model cannot be traced or is not a causal language model.
        PlanError: the ratio cannot be reached.
        CalibrationError: no calibration tokens.
        NumericsError: NaN or infinity in weights or activations.
    """
    ids = torch.as_tensor(calibration)
    if ids.ndim != 2 or not ids.numel():
        raise CalibrationError(
            f"calibration tokens have shape {tuple(ids.shape)}; expected (samples, tokens), not empty"
        )
    chosen = recipe if isinstance(recipe, Recipe) else method(recipe, ratio, heads=heads, round_to=round_to, seed=seed)
    watch = watch or Stopwatch()
    device = next(model.parameters()).device
    with watch("trace"), (progress or SILENT)("trace"):
        dense = trace(model, shape=(1, ids.shape[1]))
    with watch("analyse"):
        structure = infer(dense)
    state = State(
        batches=[b.to(device) for b in torch.split(ids, _batch_size(dense, batch))],
        sizes={name: p.numel() for name, p in model.named_parameters()},
        watch=watch,
        progress=progress or SILENT,
    )
    pruned = run_passes(attach(dense, state), chosen.passes)
    with watch("module"):
        module, failure = _prune_module(model, structure, state, pruned)
    return Result(
        model=module.module if module else None,
        graph=pruned,
        structure=structure,
        plan=state.plan,
        budget=state.budget,
        recipe={**chosen.to_dict(), **(notes or {})},
        seconds=dict(watch.stages()),
        similarity=state.similarity,
        module_failure=failure,
        _pruned=module,
        parameters_before=sum(state.sizes.values()),
    )


def run_passes(
    graph_module: fx.GraphModule,
    passes: Sequence[Pass | Callable[[fx.GraphModule], Any]],
) -> fx.GraphModule:
    """Run passes in order on a graph module that carries a state; return the last graph module.

    Raises:
        SlimgraphError: from a pass, with the name of the pass and of those before it added.
    """
    state_of(graph_module)
    names = [getattr(p, "name", "") or getattr(p, "__name__", type(p).__name__) for p in passes]
    for i, step in enumerate(passes):
        try:
            result = step(graph_module)
        except SlimgraphError as error:
            before = f", after {', '.join(names[:i])}" if i else ""
            raise type(error)(f"{error} [pass {names[i]}{before}]") from error
        graph_module = result.graph_module if result is not None else graph_module
    return graph_module


def _batch_size(graph_module: fx.GraphModule, wanted: int) -> int:
    (ids,) = graph_module.graph.find_nodes(op="placeholder")
    fixed = ids.meta["val"].shape[0]
    return fixed if isinstance(fixed, int) else wanted


def _prune_module(
    model: nn.Module, structure: Structure, state: State, pruned: fx.GraphModule
) -> tuple[PrunedModule | None, str | None]:
    try:
        return prune_module(model, resolve(structure, state.plan), pruned, state.refits), None
    except ModelError as error:
        return None, str(error)
