"""`slimgraph report`: one page about a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgraph.commands.options import Trust, Verbose, check_file_target, start, write_text
from slimgraph.debug.page import html_report

__all__ = ["report_command"]


def report_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a pruned checkpoint.")],
    html: Annotated[Path, typer.Option(help="Write the page there.")],
    bisection: Annotated[Path | None, typer.Option("--bisect", help="What `slimgraph bisect --json` wrote.")] = None,
    evaluation: Annotated[list[Path] | None, typer.Option(help="JSON of a measurement; may be repeated.")] = None,
    scores: Annotated[Path | None, typer.Option(help="What `slimgraph prune --scores` wrote.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Also draw the charts into this directory, PNG and SVG.")] = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Write one self-contained page: what was removed where, sizes, errors, a layer's graph, every parameter."""
    progress = start(verbose)
    check_file_target(html, "--html")
    with progress("report"):
        found = html_report(
            directory,
            bisection=bisection,
            evaluations=evaluation or (),
            scores=scores,
            trust_remote_code=trust_remote_code,
        )
        write_text(html, found.html())
        drawn = found.plots(plots) if plots is not None else []
    typer.echo(f"{found!r}\n{html}")
    for file in drawn:
        typer.echo(str(file))
