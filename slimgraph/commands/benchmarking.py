"""`slimgraph bench`: speed, memory and cost of models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from slimgraph.bench import Settings, bench, load_beside
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

__all__ = ["bench_command"]


def bench_command(
    models: Annotated[list[str], typer.Argument(metavar="DENSE PRUNED ...", help="The first is compared with.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once; halved when memory runs out.")] = 1,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each model, taking turns.")] = 5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    to_json: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown there.")] = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Measure tokens per second, memory, products and bytes of models side by side."""
    progress = start(verbose)
    settings = Settings(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repetitions=repetitions)
    where, precision = device_named(device), dtype_named(dtype)
    check_file_target(to_json, "--json")
    check_file_target(markdown, "--markdown")
    check_different(models)
    loaded: dict[str, nn.Module] = {}
    for name in models:
        with progress(f"load {name}"):
            loaded[name] = load_beside(
                name, others=len(loaded), device=where, dtype=precision, trust_remote_code=trust_remote_code
            )
    found = bench(loaded, settings, checkpoints={name: name for name in models}, progress=progress)
    if found.settings.batch != batch:
        typer.echo(f"memory ran out with {batch} prompts at once: measured with {found.settings.batch}", err=True)
    if to_json != "-":
        typer.echo(repr(found))
    write_json(to_json, found.to_dict())
    if markdown is not None:
        write_text(markdown, found.to_markdown())
