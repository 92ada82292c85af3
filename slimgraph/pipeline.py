"""The whole way: a model and calibration tokens in, a pruned model out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from slimgraph import checkpoint, distributed, hf
from slimgraph.budget import Budget
from slimgraph.dtypes import dtype_name
from slimgraph.errors import CalibrationError, ModelError, PlanError, SlimgraphError
from slimgraph.generate import can_generate, generate
from slimgraph.groups import Structure, infer
from slimgraph.invariants import check_pass
from slimgraph.manifest import Manifest
from slimgraph.module import PrunedModule, prune_module
from slimgraph.passes import Pass
from slimgraph.plan import Plan, resolve
from slimgraph.pretrained import check_finite, check_tokens
from slimgraph.progress import SILENT, Progress, Stopwatch
from slimgraph.recipe import Recipe, default_method, recipe_for
from slimgraph.state import State, attach, state_of
from slimgraph.text import Tokenizer, calibration_tokens, is_source
from slimgraph.trace import trace

__all__ = [
    "Calibration",
    "Result",
    "check_carried_out",
    "micro_batches",
    "prune",
    "read_calibration",
    "run_passes",
    "samples_at_once",
]


_TOKENS = 4096  # of a micro-batch: enough for full speed, few enough for small machines

Calibration: TypeAlias = Tensor | Sequence[Sequence[int]] | Sequence[str] | str | Path
"""Token ids, texts, or where a text lies."""


@dataclass(repr=False)
class Result:
    """A pruned model.

    Attributes:
        model: the pruned module, of the same class as the original; None when only the graph could be pruned.
        graph: the pruned graph.
        structure: groups and sites of the dense model.
        plan: which units stay, in units of the model that was given.
        budget: how many, and what that comes to in parameters; None for a recipe without allocation.
        recipe: what made it: the passes, and under "notes" the calibration settings and whatever the caller noted.
        seconds: by stage.
        similarity: cosine similarity of input and output per layer, when it was measured.
        module_failure: why `model` is None.
        parameters_before: parameters of the model that was given.
        scores: site -> (units,) float64, what scored lowest went first; None unless they were kept.
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
    scores: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        # The module is marked with the whole manifest later; what it was marked with before is needed each time.
        self._earlier = None if self._pruned is None else hf.manifest_of(self._pruned.module)

    @property
    def name(self) -> str:
        """Class of the model."""
        return type(self._pruned.module if self._pruned is not None else self.graph).__name__

    @property
    def parameters_after(self) -> int:
        """Parameters of the pruned model."""
        pruned = self._pruned.module if self._pruned is not None else self.graph
        return sum(p.numel() for p in pruned.parameters())

    @property
    def difference(self) -> float | None:
        """Largest difference between the logits of module and graph, over the largest logit; None without a module."""
        return None if self._pruned is None else self._pruned.difference

    def __repr__(self) -> str:
        return f"Result({self.name}: {self.parameters_before:,} -> {self.parameters_after:,} parameters)"

    def manifest(self) -> Manifest:
        """What the checkpoint says about itself, against the class of the model even when that had been pruned before.

        Its plan is then both plans in one, and the recipe of the earlier result is among the notes.

        Raises:
            ModelError: only the graph could be pruned.
            PlanError: units were chosen within one group before and are now chosen within another.
        """
        if self._pruned is None:
            raise ModelError(self.module_failure or "the module was not pruned")
        if self._earlier is None:
            return self._pruned.manifest(self.plan, self.recipe)
        both = Plan.from_dict(self._earlier.plan).then(self.plan)
        noted = {**self.recipe, "notes": {**self.recipe["notes"], "earlier": self._earlier.recipe}}
        return self._pruned.manifest(both, noted).after(self._earlier)

    def save(
        self, directory: str | Path, *, tokenizer: Any = None, force: bool = False, dtype: torch.dtype | None = None
    ) -> Path:
        """Write an ordinary checkpoint, with the recipe and the plan in its manifest.

        Args:
            directory: where to; its parents are made. It must not exist, or be empty.
            tokenizer: saved beside the model if given; anything with `save_pretrained`.
            force: replace a checkpoint that is there.
            dtype: that the parameters are written in; None for the one they have.

        Returns:
            `directory`.

        Raises:
            ModelError: only the graph could be pruned.
            CheckpointError: the place is unsuitable, or writing failed. The place is then as it was.
            NumericsError: a parameter is too large for `dtype`; likewise.
        """
        if self.model is None:
            raise ModelError(self.module_failure or "the module was not pruned")
        manifest = hf.manifest_of(self.model) or self.manifest()  # fine-tuning adds its notes to the one it bears
        return checkpoint.save(self.model, Path(directory), manifest, tokenizer=tokenizer, force=force, dtype=dtype)


def prune(
    model: nn.Module,
    calibration: Calibration,
    ratio: float = 0.2,
    *,
    tokenizer: Tokenizer | None = None,
    samples: int = 32,
    seq_len: int = 128,
    recipe: Recipe | str | None = None,
    recovery: str | None = None,
    heads: str = "auto",
    round_to: int = 8,
    batch: int | None = None,
    seed: int = 0,
    notes: dict[str, Any] | None = None,
    progress: Progress | None = None,
    watch: Stopwatch | None = None,
    verify: bool = False,
    keep_scores: bool = False,
) -> Result:
    """Make a causal language model smaller.

    Args:
        model: any causal language model that `torch.export` can trace; not changed. The result shares with it all
            parameters that nothing was cut of, so that training the one changes the other.
        calibration: token ids (samples, tokens) int64; or, with `tokenizer`, a text, a list of texts, or where a text
            lies: the path of a file or the name of a data set, see `slimgraph.text.calibration_tokens`. The method
            "slimgraph" uses 64 samples of them at most, see `slimgraph.passes.SelfCalibration`.
        ratio: share of all parameters that goes; ignored when `recipe` is a `Recipe`.
        tokenizer: of the model, for a calibration text.
        samples: number of windows that are drawn from a calibration text.
        seq_len: tokens of each window.
        recipe: a `Recipe`, or the name of a method, see `slimgraph.recipe.method`; "slimgraph" by default, or "slimllm"
            for a model that cannot write text, see `slimgraph.generate.can_generate`.
        recovery: "least_squares", "regression", "bias_only" or "no_recovery" instead of the method's own; see
            `slimgraph.recipe.method`. This, `heads` and `round_to` are ignored when `recipe` is a `Recipe`.
        heads: "kv", "balanced" or "auto": what goes under grouped-query attention.
        round_to: kept channels are a multiple of this, at sites that have more.
        batch: samples that go through the model at once; as many as have 4 096 tokens by default.
        seed: of the drawn windows and, unless `recipe` is a `Recipe`, of what the model writes itself and of random
            scores.
        notes: kept in the result's recipe, beside the calibration settings and the name of the method.
        progress: shows what is going on; quiet by default.
        watch: collects seconds by stage.
        verify: check every invariant after each pass; an error then names the pass that broke it.
        keep_scores: keep the score of every unit at the sites that are cut, in `Result.scores`.

    Returns:
        The pruned model and graph. A transformers model is marked as pruned: its own `save_pretrained` writes what
        `from_pretrained` reads, and it can be pruned again.

    Raises:
        ModelError: the model cannot be traced or is not a causal language model.
        PlanError: the ratio cannot be reached; the message says which one can.
        RecipeError: there is no such method or recovery.
        CalibrationError: no calibration tokens, too few, or some that the model does not know.
        NumericsError: NaN or infinity in weights or activations.
        GraphError: an axis rule contradicts the graph, or the graph shows no layers where a pass needs them.
        EvaluationError: memory runs out with a single sample while the model writes some.
    """
    writes = can_generate(model)
    named = default_method(writes) if recipe is None else recipe
    chosen = recipe_for(named, ratio, recovery=recovery, heads=heads, round_to=round_to, seed=seed)
    watch = watch or Stopwatch()
    ids, settings = read_calibration(calibration, tokenizer, samples, seq_len, seed)
    check_tokens(model, ids)
    check_finite(model)
    first = next(model.parameters())
    device = first.device
    settings["dtype"] = dtype_name(first.dtype)
    if isinstance(named, str):
        settings["method"] = named
    with watch("trace"), (progress or SILENT)("trace"):
        dense = trace(model, shape=(1, ids.shape[1]))
    with watch("analyse"):
        structure = infer(dense)
    state = State(
        batches=micro_batches(dense, distributed.share(ids), batch, device),
        at_once=samples_at_once(dense, ids, batch),
        combine=distributed.combine,
        sizes={name: p.numel() for name, p in model.named_parameters()},
        watch=watch,
        progress=progress or SILENT,
        generate=partial(generate, model) if writes else None,
        scores={} if keep_scores else None,
    )
    pruned = run_passes(attach(dense, state), chosen.passes, verify=verify)
    check_carried_out(state)
    with watch("module"):
        module, failure = _prune_module(model, structure, state, pruned)
    result = Result(
        model=module.module if module else None,
        graph=pruned,
        structure=structure,
        plan=state.plan,
        budget=state.budget,
        recipe={**chosen.to_dict(), "notes": {**settings, **(notes or {})}},
        seconds=dict(watch.stages()),
        similarity=state.similarity,
        module_failure=failure,
        _pruned=module,
        parameters_before=sum(state.sizes.values()),
        scores=state.scores,
    )
    if isinstance(result.model, PreTrainedModel):  # its own save_pretrained and a further prune go by the mark
        hf.attach(result.model, result.manifest())
    return result


def run_passes(
    graph_module: fx.GraphModule,
    passes: Sequence[Pass | Callable[[fx.GraphModule], Any]],
    *,
    verify: bool = False,
) -> fx.GraphModule:
    """Run passes in order on a graph module that carries a state; return the last graph module.

    Args:
        graph_module: carries a state.
        passes: in order.
        verify: after each pass check every invariant of the graph: well formed, consistent shapes, finite numbers, and
            masked equivalence with the graph as it was before the first pass.

    Raises:
        SlimgraphError: from a pass or a check after it, with the name of the pass and of those before it added.
    """
    state = state_of(graph_module)
    dense = infer(graph_module) if verify else None
    names = [getattr(p, "name", "") or getattr(p, "__name__", type(p).__name__) for p in passes]
    for i, step in enumerate(passes):
        try:
            result = step(graph_module)
            graph_module = result.graph_module if result is not None else graph_module
            if dense is not None:
                check_pass(graph_module, state, dense)
        except SlimgraphError as error:
            before = f", after {', '.join(names[:i])}" if i else ""
            raise type(error)(f"{error} [pass {names[i]}{before}]") from error
    return graph_module


def check_carried_out(state: State) -> None:
    """Refuse a recipe that shares out a budget and stops there.

    Raises:
        PlanError: no sweep followed the last allocation.
    """
    if state.pending is not None:
        raise PlanError(
            f"{state.pending} has shared out a budget, which nothing has carried out; expected a sweep after it in the "
            "recipe"
        )


def read_calibration(
    calibration: Calibration, tokenizer: Tokenizer | None, samples: int, seq_len: int, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Token ids (samples, tokens), and for the record where they are from; see `prune` for the arguments."""
    if isinstance(calibration, (str, Path)) or _are_texts(calibration):
        if tokenizer is None:
            raise CalibrationError("calibration is a text and there is no tokenizer; give tokenizer=, or token ids")
        ids = calibration_tokens(calibration, tokenizer, samples=samples, seq_len=seq_len, seed=seed)  # type: ignore[arg-type]
        named = isinstance(calibration, Path) or (isinstance(calibration, str) and is_source(calibration))
        return ids, {
            "calibration": str(calibration) if named else "text",
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
        }
    ids = torch.as_tensor(calibration)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"calibration tokens are {ids.dtype}; expected integers, the ids of tokens")
    ids = ids.long()
    if ids.ndim != 2 or not ids.numel():
        raise CalibrationError(
            f"calibration tokens have shape {tuple(ids.shape)}; expected (samples, tokens), not empty"
        )
    return ids, {"calibration": "tokens", "samples": ids.shape[0], "seq_len": ids.shape[1], "seed": seed}


def _are_texts(calibration: object) -> bool:
    return isinstance(calibration, (list, tuple)) and len(calibration) > 0 and isinstance(calibration[0], str)


def micro_batches(graph_module: fx.GraphModule, ids: Tensor, batch: int | None, device: torch.device) -> list[Tensor]:
    """Calibration samples as they go through the graph together, (samples, tokens) int64 each.

    Args:
        graph_module: a traced graph; one that works for a single batch size gets that.
        ids: (samples, tokens).
        batch: samples at once; as many as have 4 096 tokens by default.
        device: where to.

    Raises:
        CalibrationError: `batch` is below 1.
    """
    return [b.to(device) for b in torch.split(ids, samples_at_once(graph_module, ids, batch))]


def samples_at_once(graph_module: fx.GraphModule, ids: Tensor, batch: int | None) -> int:
    """Samples of a full micro-batch; see `micro_batches`."""
    if batch is not None and batch < 1:
        raise CalibrationError(f"batch is {batch}; expected at least 1 sample at once")
    (inputs,) = graph_module.graph.find_nodes(op="placeholder")
    fixed = inputs.meta["val"].shape[0]
    if isinstance(fixed, int):
        return fixed
    return batch if batch is not None else max(1, _TOKENS // ids.shape[1])


def _prune_module(
    model: nn.Module, structure: Structure, state: State, pruned: fx.GraphModule
) -> tuple[PrunedModule | None, str | None]:
    try:
        return prune_module(model, resolve(structure, state.plan), pruned, state.refits), None
    except ModelError as error:
        return None, str(error)
