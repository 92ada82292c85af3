"""`slimgraph diff` and `slimgraph bisect`: a pruned model beside the one it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgraph.commands.options import (
    Device,
    Dtype,
    Json,
    Trust,
    Verbose,
    check_file_target,
    device_named,
    dtype_named,
    start,
    write_json,
    write_text,
)
from slimgraph.debug.bisect import bisect
from slimgraph.debug.diff import diff
from slimgraph.debug.export import node_data
from slimgraph.pretrained import load_tokenizer
from slimgraph.text import read_tokens

__all__ = ["bisect_command", "diff_command"]

_Overlay = Annotated[
    Path | None, typer.Option("--node-data", help="Write the error at every node there, for Model Explorer.")
]


def diff_command(
    models: Annotated[
        list[str], typer.Argument(metavar="[DENSE] PRUNED", help="Directories or hub names; PRUNED alone will do.")
    ],
    to_json: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown there.")] = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Show what pruning changed: groups, shapes, sizes in the graph, biases, attributes. Reads no weights."""
    if len(models) > 2:
        raise typer.BadParameter(f"expected DENSE and PRUNED, or PRUNED alone; found {len(models)} models")
    progress = start(verbose)
    check_file_target(to_json, "--json")
    check_file_target(markdown, "--markdown")
    with progress("trace"):
        found = diff(models[0] if len(models) == 2 else None, models[-1], trust_remote_code=trust_remote_code)
    if to_json != "-":
        typer.echo(repr(found))
    write_json(to_json, found.to_dict())
    if markdown is not None:
        write_text(markdown, found.to_markdown())


def bisect_command(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="Directory or hub name.")],
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="Directory or hub name.")],
    text: Annotated[str, typer.Option(help="Text file, or name[:config][@split] of a data set.")],
    tokens: Annotated[int, typer.Option(min=2, help="Of the text, from its start.")] = 1024,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 4,
    threshold: Annotated[float, typer.Option(min=0.0, help="Relative error of the first node to name.")] = 0.1,
    restore: Annotated[bool, typer.Option(help="Also restore one layer at a time.")] = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    to_json: Json = None,
    overlay: _Overlay = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Find where a pruned model goes wrong: both graphs on the same tokens, compared node by node."""
    progress = start(verbose)
    where, precision = device_named(device), dtype_named(dtype)
    check_file_target(to_json, "--json")
    check_file_target(overlay, "--node-data")
    ids = read_tokens(text, load_tokenizer(dense, trust_remote_code=trust_remote_code), limit=tokens)
    found = bisect(
        dense,
        pruned,
        ids,
        seq_len=seq_len,
        batch=batch,
        threshold=threshold,
        restore=restore,
        dtype=precision,
        device=where,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if to_json != "-":
        typer.echo(repr(found))
    write_json(to_json, found.to_dict())
    if overlay is not None:
        write_json(str(overlay), node_data(found))
