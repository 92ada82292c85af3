"""`slimgraph demo`: the whole way on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgraph import demo
from slimgraph.commands.options import Verbose, start

__all__ = ["demo_command"]


def demo_command(
    out: Annotated[Path | None, typer.Option(help=f"For the pruned checkpoint.  [default: {demo.OUT}]")] = None,
    model: Annotated[str | None, typer.Option(help="Another model.  [default: SmolLM2-135M, fetched once]")] = None,
    ratio: Annotated[float, typer.Option(help="Share of all parameters that goes.")] = 0.2,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows of 128 tokens.")] = 32,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of the evaluation text.")] = 6144,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at --out.")] = False,
    verbose: Verbose = False,
) -> None:
    """Prune a small model for real by slimllm, compare it with the dense one, save it and load it again."""
    demo.run(start(verbose), out=out, model=model, ratio=ratio, samples=samples, tokens=tokens, force=force)
