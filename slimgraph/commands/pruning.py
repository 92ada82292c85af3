"""`slimgraph prune`: a model in, a smaller one out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from slimgraph import checkpoint, distributed
from slimgraph.capacity import memory_free, memory_needed
from slimgraph.commands.options import (
    Device,
    Model,
    Trust,
    Verbose,
    WorkDtype,
    check_file_target,
    device_named,
    dtype_named,
    start,
    write_json,
    write_text,
)
from slimgraph.debug import report
from slimgraph.dtypes import dtype_name
from slimgraph.errors import CheckpointError, ModelError, RecipeError
from slimgraph.pipeline import prune as prune_model
from slimgraph.pretrained import load_model, load_tokenizer, own_dtype
from slimgraph.progress import SILENT, Stopwatch
from slimgraph.recipe import METHODS, Recipe, default_method, recipe_for
from slimgraph.shards import run_folder
from slimgraph.streaming import prune_checkpoint
from slimgraph.text import mixed_tokens
from slimgraph.units import HEAD_MODES

__all__ = ["prune_command"]

_DEFAULT_TEXT = "prose of the Python language reference"


def prune_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the pruned checkpoint.")],
    ratio: Annotated[float | None, typer.Option(help="Share of all parameters that goes.  [default: 0.2]")] = None,
    method_name: Annotated[
        str | None,
        typer.Option(
            "--method",
            help=f"One of {', '.join(METHODS)}.  [default: slimgraph; slimllm where weights are streamed]",
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML list of passes, instead of a method and a ratio.")] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, or name[:config][@split] of a data set; several times to share the windows among texts.  "
            f"[default: {_DEFAULT_TEXT}]"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Calibration windows; the default method uses 64 at most, and writes more.")
    ] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 128,
    seed: Annotated[int, typer.Option(help="Of windows; with --method of written samples and random scores, too.")] = 0,
    heads: Annotated[str | None, typer.Option(help=f"{', '.join(HEAD_MODES)}: what goes of attention.")] = None,
    round_to: Annotated[
        int | None, typer.Option(min=1, help="Kept channels are a multiple, at sites that have more.  [default: 8]")
    ] = None,
    no_recovery: Annotated[bool, typer.Option("--no-recovery", help="Do not refit the output projections.")] = False,
    device: Device = "cpu",
    dtype: WorkDtype = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read and write weights layer by layer.  [default: for a directory whose weights take more than half "
            "of the free memory]",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a streamed run that was stopped.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check every invariant after each pass.")] = False,
    plan: Annotated[Path | None, typer.Option(help="Where to write which units stay, as JSON.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Where to write the score of every unit, as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Remove a share of a model's parameters and save the smaller model."""
    progress, watch = start(verbose), Stopwatch()
    precision = dtype_named(dtype or "float32")
    streams = _streams(stream, resume, model, precision)
    if recipe is not None:
        _check_alone(method_name, ratio, heads, round_to, no_recovery)
    options = _method_options(ratio, heads, round_to, no_recovery, seed)
    chosen = method_name if recipe is None else Recipe.from_file(recipe)
    recipe_for(chosen or default_method(writes=not streams), **options)  # refuses before anything is loaded
    if Path(model).expanduser().resolve() == out.resolve():
        raise CheckpointError(f"--out is {out}, the model itself, which would be lost; choose another directory")
    check_file_target(plan, "--plan", new=not force)
    check_file_target(scores, "--scores", new=not force)
    notes = {"model": model, "calibration": ", ".join(calibration or [_DEFAULT_TEXT])}
    if recipe is not None:
        notes["method"] = f"recipe {recipe.name}"
    with distributed.joined(device_named(device)) as where:
        if not distributed.is_first():
            progress = SILENT
        if distributed.is_first():
            checkpoint.check_target(out, force=force)
        with watch("load"), progress("read the calibration text"):
            saved = None if dtype else own_dtype(model, trust_remote_code=trust_remote_code)
            tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
            ids = mixed_tokens(calibration or [], tokenizer, samples=samples, seq_len=seq_len, seed=seed)
        if streams:
            if verify:
                raise ModelError(
                    "--verify needs the weights in memory; stream without it and run slimgraph verify on the result"
                )
            with _resumable(out):
                result = prune_checkpoint(
                    model,
                    out,
                    ids,
                    recipe=chosen or default_method(writes=False),
                    **options,
                    tokenizer=tokenizer,
                    dtype=precision,
                    save_dtype=saved,
                    device=where,
                    resume=resume,
                    force=force,
                    keep_scores=scores is not None,
                    trust_remote_code=trust_remote_code,
                    notes=notes,
                    progress=progress,
                    watch=watch,
                )
        else:
            with watch("load"), progress(f"load {model}"):
                dense = load_model(model, dtype=precision, device=where, trust_remote_code=trust_remote_code)
            result = prune_model(
                dense,
                ids,
                recipe=chosen,
                **options,
                notes=notes,
                progress=progress,
                watch=watch,
                verify=verify,
                keep_scores=scores is not None,
            )
            if result.model is None:
                raise ModelError(f"{result.module_failure}; nothing was written")
            if distributed.is_first():
                with watch("save"), progress("save"):
                    result.save(out, tokenizer=tokenizer, force=force, dtype=saved)
            distributed.barrier()
        if not distributed.is_first():
            return
    if plan is not None:
        write_text(plan, result.plan.to_json())
    if scores is not None:
        write_json(str(scores), {site: each.tolist() for site, each in (result.scores or {}).items()})
    result.seconds = watch.stages()
    processes = f", {distributed.world()} processes" if distributed.world() > 1 else ""
    typer.echo(
        f"{result.name} {model}: {result.recipe['notes']['method']}, {samples} x {seq_len} calibration tokens of "
        f"{notes['calibration']}, seed {seed}, {dtype_name(precision)} on {device}{processes}\n"
    )
    typer.echo(report(result, inner=watch.outer()))
    typer.echo(f"checkpoint   {out}, {dtype_name(saved or precision)}")


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say how to go on with a streamed run that somebody stops."""
    try:
        yield
    except KeyboardInterrupt:
        folder = run_folder(out.resolve())
        if folder.exists() and distributed.is_first():
            typer.echo(f"slimgraph: {folder} keeps what is finished; repeat the command with --resume", err=True)
        raise


def _streams(asked: bool | None, resume: bool, model: str, dtype: torch.dtype) -> bool:
    """Whether weights are streamed: as asked, else where they would take more than half of the free memory."""
    if resume and asked is False:
        raise ModelError("--resume and --no-stream were both given; only streamed runs can be gone on with")
    if asked is not None or resume:
        return asked is not False
    directory = Path(model).expanduser()
    if not directory.is_dir():
        return False
    return memory_needed(directory, dtype) > 0.5 * memory_free()


def _check_alone(
    name: str | None, ratio: float | None, heads: str | None, round_to: int | None, no_recovery: bool
) -> None:
    """Refuse options that a recipe, which was given as well, says itself."""
    given = {"--method": name, "--ratio": ratio, "--heads": heads, "--round-to": round_to}
    given["--no-recovery"] = no_recovery or None
    for option, value in given.items():
        if value is not None:
            raise RecipeError(f"{option} and --recipe were both given; a recipe says that itself: leave one out")


def _method_options(
    ratio: float | None, heads: str | None, round_to: int | None, no_recovery: bool, seed: int
) -> dict[str, Any]:
    """What a method takes besides its name; recipes say it themselves."""
    if heads is not None and heads not in HEAD_MODES:
        raise RecipeError(f"--heads is {heads!r}; expected one of {', '.join(HEAD_MODES)}")
    return {
        "ratio": 0.2 if ratio is None else ratio,
        "recovery": "no_recovery" if no_recovery else None,
        "heads": heads or "auto",
        "round_to": round_to or 8,
        "seed": seed,
    }
