"""`slimgraph compare`: models against each other, in one table."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from slimgraph.bench import Settings, load_beside
from slimgraph.commands.options import (
    Device,
    Dtype,
    Json,
    Trust,
    Verbose,
    check_different,
    check_file_target,
    device_named,
    dtype_named,
    start,
    write_json,
    write_text,
)
from slimgraph.compare import Contender, Measures, TaskRunner, compare, pruned_at
from slimgraph.errors import ModelError, PlanError
from slimgraph.plots import check_plot, plot
from slimgraph.pretrained import load_tokenizer
from slimgraph.progress import Progress
from slimgraph.text import BOS_MODES, mixed_tokens

__all__ = ["compare_command"]


def compare_command(
    models: Annotated[list[str], typer.Argument(metavar="A B C ...", help="Shares are of the first.")],
    text: Annotated[
        list[str] | None, typer.Option(help="Text to take the perplexity on; give it again for more.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each window, those of calibration too.")] = 128,
    tokens: Annotated[int | None, typer.Option(min=2, help="Only the first so many tokens of each text.")] = None,
    bos: Annotated[
        str, typer.Option(help=f"Start-of-text token on every window and prompt: {', '.join(BOS_MODES)}.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 8,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval with commas between them, or paper: the seven of the paper.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files, for --tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples of each task.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Tokens per second, all models in memory at once.")] = False,
    prune_at: Annotated[
        str | None, typer.Option("--ratios", metavar="RATIOS", help="Also the first model pruned by 0.1,0.2,...")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="For --ratios, as in prune.  [default: prose of the Python language reference]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="For --ratios, as in prune.")] = 32,
    method: Annotated[str | None, typer.Option(help="For --ratios, as in prune.  [default: slimgraph]")] = None,
    seed: Annotated[int, typer.Option(help="For --ratios, as in prune.")] = 0,
    plot_to: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Picture, .png or .svg.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    to_json: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown there.")] = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Compare models: size, products per token, cache, perplexities, tasks and speed."""
    progress = start(verbose)
    ratios = _ratios(prune_at)
    where, precision = device_named(device), dtype_named(dtype)
    check_different(models)
    check_file_target(to_json, "--json")
    check_file_target(markdown, "--markdown")
    if plot_to is not None:
        check_plot(plot_to)
        if not (text or tasks or speed):
            raise ModelError("--plot has nothing to draw; give --text, --tasks or --speed as well")
    runner = None if tasks is None else _task_runner(tasks.split(","), include_path, limit, bos, progress)
    contenders = [_contender(name, where, precision, trust_remote_code) for name in models]
    if ratios:
        with progress(f"load {models[0]}"):
            dense = contenders[0].load()
        contenders[0] = replace(contenders[0], load=lambda: dense)  # one copy for itself and for what is made of it
        contenders += _pruned(contenders[0], ratios, calibration, samples, seq_len, seed, method, progress)
    measures = Measures(
        texts=text or [],
        seq_len=seq_len,
        tokens=tokens,
        bos=bos,
        batch=batch,
        tasks=runner,
        speed=Settings() if speed else None,
    )
    found = compare(contenders, measures, progress=progress)
    if to_json != "-":
        typer.echo(repr(found))
    write_json(to_json, found.to_dict())
    if markdown is not None:
        write_text(markdown, found.to_markdown())
    if plot_to is not None:
        plot(found, plot_to)


def _ratios(given: str | None) -> list[float]:
    if given is None:
        return []
    try:
        return [float(part) for part in given.split(",")]
    except ValueError as error:
        raise PlanError(f"--ratios is {given!r}; expected ratios with commas between them, like 0.1,0.2,0.5") from error


def _task_runner(
    names: list[str], include_path: Path | None, limit: int | None, bos: str, progress: Progress
) -> TaskRunner:
    """Scores of tasks that are read once, before any model is."""
    from slimgraph.tasks import evaluate_tasks, load_tasks

    loaded = load_tasks(names, include_path=include_path, progress=progress)

    def run(model: nn.Module, tokenizer: Any) -> dict[str, float]:
        return evaluate_tasks(model, tokenizer, loaded, limit=limit, bos=bos, progress=progress).percents()

    return run


def _contender(name: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> Contender:
    load = partial(load_beside, name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return Contender(name, load, tokenizer, checkpoint=name)


def _pruned(
    dense: Contender,
    ratios: list[float],
    calibration: list[str] | None,
    samples: int,
    seq_len: int,
    seed: int,
    method: str | None,
    progress: Progress,
) -> list[Contender]:
    ids = mixed_tokens(calibration or [], dense.tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    return pruned_at(
        dense.name, dense.load(), ratios, ids, tokenizer=dense.tokenizer, method=method, seed=seed, progress=progress
    )
