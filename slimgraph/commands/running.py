"""`slimgraph run`: prune, fine-tune, evaluate and compare by one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgraph.commands.options import Verbose, device_named, start
from slimgraph.run import RunFile, run

__all__ = ["run_command"]


def run_command(
    file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="A run file; examples/ has some.")],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Instead of what the file says, like calibration.samples=64."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what another run left in the folder.")] = False,
    verbose: Verbose = False,
) -> None:
    """Prune a model, then fine-tune, evaluate and compare it, as a file says. Goes on where it was stopped."""
    progress = start(verbose)
    plan = RunFile.from_file(file, change or ())
    device_named(plan.device)
    typer.echo(repr(run(plan, force=force, progress=progress)))
