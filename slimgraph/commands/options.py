"""Options that commands share, and the files that they write besides checkpoints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from slimgraph.errors import CheckpointError, ModelError
from slimgraph.jsontext import json_text
from slimgraph.progress import Progress

__all__ = [
    "DTYPES",
    "Device",
    "Dtype",
    "Json",
    "Model",
    "Trust",
    "Verbose",
    "WorkDtype",
    "check_different",
    "check_file_target",
    "device_named",
    "dtype_named",
    "start",
    "write_json",
    "write_text",
]

DTYPES = ("float32", "float64", "bfloat16", "float16")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a checkpoint, or a name on the hub.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]
WorkDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help=f"Of the weights, as computed and as saved: {', '.join(DTYPES)}.  "
        "[default: computed in float32, saved in the checkpoint's own]",
    ),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that the checkpoint brings.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what each stage does.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON there; - for standard output.")]


def start(verbose: bool) -> Progress:
    """Other libraries are quietened; what Slimgraph logs shows when asked for."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    if not verbose:
        warnings.simplefilter("ignore")
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        ours = logging.getLogger("slimgraph")
        ours.handlers[:] = [handler]
        ours.setLevel(logging.INFO)
    return Progress(enabled=True)


def device_named(name: str) -> torch.device:
    """The device of that name, once it is known that it works; raises ModelError."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"--device is {name!r}, which cannot be used here ({reason}); expected cpu or cuda") from error
    if device.type == "meta":
        raise ModelError("--device is 'meta', which has no values; expected cpu or cuda")
    return device


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name; raises ModelError."""
    if name not in DTYPES:
        raise ModelError(f"--dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def check_different(models: Sequence[str]) -> None:
    """Check that no model was given twice; raises ModelError."""
    twice = [name for name in models if models.count(name) > 1]
    if twice:
        raise ModelError(f"{twice[0]} was given {models.count(twice[0])} times; give each model once")


def check_file_target(target: str | Path | None, option: str, *, new: bool = False) -> None:
    """Before the work, so that it is not lost; with `new`, nothing may be there."""
    if target is None or target == "-":
        return
    path = Path(target)
    if path.is_dir() or not path.parent.is_dir():
        found = "is a directory" if path.is_dir() else f"lies in {path.parent}, which is no directory"
        raise CheckpointError(f"{option}: {path} {found}; give the path of a file in a directory that exists")
    if new and path.exists():
        raise CheckpointError(f"{option}: {path} exists, and would be written; give another path, or --force")


def write_json(target: str | None, data: dict[str, Any]) -> None:
    """Write JSON to a file, or to standard output for `-`; NaN and infinity become null."""
    if target is None:
        return
    text = json_text(data)
    if target == "-":
        typer.echo(text)
    else:
        write_text(Path(target), text)


def write_text(path: Path, text: str) -> None:
    """Write a text file; raises CheckpointError when that fails."""
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
