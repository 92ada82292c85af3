"""The whole way for models of any size: weights come from the checkpoint layer by layer, and go to another one.

The same passes make the same decisions as in `slimgraph.pipeline.prune`; only where weights come from and go to
differs. The model is traced with stand-ins for its parameters. During the sweep each weight is read when it is first
used, pruned and refitted, written, and dropped. What is held at a time is a few layers and the calibration activations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from slimgraph import checkpoint, distributed
from slimgraph.dtypes import dtype_name
from slimgraph.errors import CheckpointError, PlanError
from slimgraph.groups import Structure, infer
from slimgraph.module import prune_module
from slimgraph.passes import ApplyPlan, SelfCalibration
from slimgraph.pipeline import (
    Calibration,
    Result,
    check_carried_out,
    micro_batches,
    read_calibration,
    run_passes,
    samples_at_once,
)
from slimgraph.plan import resolve
from slimgraph.pretrained import check_tokens, load_skeleton
from slimgraph.products import faster_in
from slimgraph.progress import SILENT, Progress, Stopwatch
from slimgraph.recipe import Recipe, recipe_for
from slimgraph.shards import Shards, run_folder
from slimgraph.state import State, attach
from slimgraph.store import Store
from slimgraph.text import Tokenizer
from slimgraph.trace import trace
from slimgraph.units import Units, units_of

__all__ = ["prune_checkpoint"]


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    calibration: Calibration,
    ratio: float = 0.2,
    *,
    tokenizer: Tokenizer | None = None,
    samples: int = 32,
    seq_len: int = 128,
    recipe: Recipe | str = "slimllm",
    recovery: str | None = None,
    heads: str = "auto",
    round_to: int = 8,
    batch: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    save_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    notes: dict[str, Any] | None = None,
    progress: Progress | None = None,
    watch: Stopwatch | None = None,
    keep_scores: bool = False,
) -> Result:
    """Make a checkpoint smaller without ever holding the model in memory.

    Args:
        source: directory of a checkpoint with safetensors files.
        out: directory for the smaller one.
        calibration: token ids, texts, or where a text lies; under `torchrun` each process takes its share of it.
        ratio: share of all parameters that goes; ignored when `recipe` is a `Recipe`.
        tokenizer: of the model, for a calibration text; saved beside the weights.
        samples: number of windows that are drawn from a calibration text.
        seq_len: tokens of each window.
        recipe: a `Recipe`, or the name of a method.
        recovery: instead of the method's own.
        heads: "kv", "balanced" or "auto".
        round_to: kept channels are a multiple of this, at sites that have more.
        batch: samples that go through the model at once; as many as have 4 096 tokens by default.
        seed: of the drawn windows and of random scores.
        dtype: that weights are computed in; statistics are float64, scores and fits of bfloat16 models
            float32, else float64.
        save_dtype: that floating-point parameters are written in; None for `dtype`.
        device: where to compute; weights are read ahead of their use.
        resume: go on with a run to `out` that was stopped.
        force: replace a checkpoint that is there.
        trust_remote_code: run modeling code that the checkpoint brings.
        notes: kept in the checkpoint's recipe, beside the calibration settings and the name of the method.
        progress: shows what is going on; quiet by default.
        watch: collects seconds by stage.
        keep_scores: keep the score of every unit at the sites that are cut in this run, in `Result.scores`.

    Returns:
        What was decided. Its `model` is None: the weights are in `out`.

    Raises:
        ModelError: the model cannot be traced, its files do not hold its weights under their own names, or the module
            cannot be made to agree with the pruned graph; nothing is published then.
        CheckpointError: `out` cannot be written, or a stopped run lies there.
        PlanError, RecipeError, CalibrationError, NumericsError: as in `slimgraph.prune`; the last one also where a
            parameter is too large for `save_dtype`.
    """
    chosen = recipe_for(recipe, ratio, recovery=recovery, heads=heads, round_to=round_to, seed=seed)
    _check_streamable(chosen)
    watch, progress, place = watch or Stopwatch(), progress or SILENT, torch.device(device)
    target = Path(out).resolve()
    if distributed.is_first():
        checkpoint.check_target(target, force=force)
    ids, settings = read_calibration(calibration, tokenizer, samples, seq_len, seed)
    settings["dtype"] = dtype_name(dtype)
    if isinstance(recipe, str):
        settings["method"] = recipe
    with watch("load"):
        model, stand_in = load_skeleton(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    check_tokens(model, ids)
    with watch("trace"), progress("trace"):
        dense = trace(model, shape=(1, ids.shape[1]))
    with watch("analyse"):
        structure = infer(dense)
    store = Store(Path(source).expanduser(), model, dtype, place)
    batches = micro_batches(dense, distributed.share(ids), batch, place)
    folder = run_folder(target)
    try:
        with Shards(
            folder,
            _fingerprint(Path(source), chosen, ids, samples_at_once(dense, ids, batch), (dtype, save_dtype), place),
            structure,
            model,
            store,
            stand_in,
            _possible_units(structure, chosen),
            place,
            resume=resume,
            watch=watch,
            dtype=save_dtype,
        ) as shards:
            state = State(
                batches=batches,
                sizes={name: p.numel() for name, p in model.named_parameters()},
                similarity=shards.similarity,
                watch=watch,
                progress=progress,
                weights=store,
                combine=distributed.combine,
                sink=shards,
                scores={} if keep_scores else None,
            )
            pruned = run_passes(attach(dense, state), chosen.passes)
            check_carried_out(state)
            with watch("module"):
                module = prune_module(model, resolve(structure, state.plan), pruned, state.refits)
            result = Result(
                model=None,
                graph=pruned,
                structure=structure,
                plan=state.plan,
                budget=state.budget,
                recipe={**chosen.to_dict(), "notes": {**settings, **(notes or {})}},
                seconds={},
                similarity=state.similarity,
                module_failure=f"the weights were written to {out} and are not in memory; load them from there",
                _pruned=module,
                parameters_before=sum(state.sizes.values()),
                scores=state.scores,
            )
            with watch("write"):
                if distributed.is_first():
                    _finish(shards, module.module, result, folder, target, tokenizer, save_dtype)
                distributed.barrier()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written ({type(error).__name__}: {error}); what was at {target} before is "
            "untouched: mend the cause and go on (resume)"
        ) from error
    finally:
        store.close()
    result.seconds = dict(watch.stages())
    return result


def _check_streamable(recipe: Recipe) -> None:
    """Refuse what needs the weights in memory as a whole, or more than once."""
    writing = [p.name for p in recipe.passes if isinstance(p, SelfCalibration)]
    if writing:
        raise PlanError(
            f"{writing[0]}: a model whose weights are streamed cannot write samples of its own; prune in memory "
            "(--no-stream), or take a recipe without that pass, or the method slimllm"
        )
    cutting = [p.name for p in recipe.passes if p.gives == "cut" or isinstance(p, ApplyPlan)]
    if len(cutting) > 1:
        raise PlanError(
            f"a streamed model can be cut by one pass only, found {' and '.join(cutting)}: its weights are written as "
            "soon as they are cut. Leave the other cutting passes out, or prune in memory"
        )


def _finish(
    shards: Shards,
    model: nn.Module,
    result: Result,
    folder: Path,
    target: Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None,
) -> None:
    manifest = result.manifest()
    checkpoint.write_description(model, manifest, folder, tokenizer=tokenizer, dtype=dtype)
    shards.finish(result.plan, {name: model.get_buffer(name) for name in manifest.buffers})
    checkpoint.check_written(folder, model, manifest)
    checkpoint.publish(folder, target)
    shards.forget(target)


def _possible_units(structure: Structure, recipe: Recipe) -> dict[str, Units]:
    """The units that the recipe's allocation will give each site."""
    modes = [heads for p in recipe.passes if (heads := getattr(p, "heads", None)) is not None]
    mode = modes[0] if modes else "auto"
    return {site.name: units_of(structure, site, mode) for site in structure.prunable_sites()}


def _fingerprint(
    source: Path,
    recipe: Recipe,
    ids: Tensor,
    at_once: int,
    dtypes: Sequence[torch.dtype | None],
    device: torch.device,
) -> str:
    """Of everything that decides the result to the last bit."""
    files: Sequence[Path] = sorted(source.expanduser().glob("*.safetensors"))
    lowers = any(getattr(p, "dtype", None) for p in recipe.passes)
    described = {
        "files": [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        "config": (source.expanduser() / "config.json").read_text(encoding="utf-8"),
        "recipe": recipe.to_dict(),
        "ids": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "dtypes": [str(dtype) for dtype in dtypes],
        "at_once": at_once,
        "lower": lowers and faster_in(torch.bfloat16, device),
        "device": device.type,
        "processes": distributed.world(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
