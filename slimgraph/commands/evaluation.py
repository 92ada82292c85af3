"""`slimgraph eval`: how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgraph.commands.options import (
    Device,
    Dtype,
    Json,
    Model,
    Trust,
    Verbose,
    check_file_target,
    device_named,
    dtype_named,
    start,
    write_json,
)
from slimgraph.corpora import NAMED
from slimgraph.errors import EvaluationError
from slimgraph.evaluation import evaluate
from slimgraph.pretrained import load_model, load_tokenizer
from slimgraph.tasks import load_tasks
from slimgraph.text import BOS_MODES

__all__ = ["eval_command"]


def eval_command(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Perplexity on a text file, {', '.join(NAMED)}, or name[:config][@split] of a data set. Repeatable."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-eval, separated by commas; `paper` for the seven of the paper. Repeatable."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files; they may run Python code.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples of each task.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each window of a text.")] = 128,
    tokens: Annotated[int | None, typer.Option(min=2, help="Only the first so many tokens of each text.")] = None,
    bos: Annotated[
        str,
        typer.Option(help=f"Start-of-text token on every window and prompt: {', '.join(BOS_MODES)}."),
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Windows or requests at once; halved when memory runs out.")] = 8,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    to_json: Json = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model, pruned or not: perplexity on texts, and zero-shot tasks by lm-eval."""
    progress = start(verbose)
    where, precision = device_named(device), dtype_named(dtype)
    check_file_target(to_json, "--json")
    names = [name for given in tasks or () for name in given.split(",") if name]
    if not text and not names:
        raise EvaluationError("neither --text nor --tasks was given; expected something to measure the model on")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    # Before the weights: a wrong name is then known at once.
    harness = load_tasks(names, include_path=include_path, progress=progress) if names else ()
    with progress(f"load {model}"):
        loaded = load_model(model, dtype=precision, device=where, trust_remote_code=trust_remote_code)
    found = evaluate(
        loaded,
        tokenizer,
        texts=text or (),
        tasks=harness,
        seq_len=seq_len,
        tokens=tokens,
        bos=bos,
        limit=limit,
        batch=batch,
        progress=progress,
    )
    if to_json != "-":
        typer.echo(f"{model}: {found}")
    write_json(to_json, {"model": model, "bos": bos, **found.to_dict()})
