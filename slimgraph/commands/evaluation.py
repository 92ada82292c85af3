"""`slimgraph eval`: how good a model is."""

from __future__ import annotations

import dataclasses
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
from slimgraph.perplexity import perplexity
from slimgraph.pretrained import check_finite, check_tokens, load_model, load_tokenizer
from slimgraph.text import read_tokens

__all__ = ["eval_command"]


def eval_command(
    model: Model,
    text: Annotated[str, typer.Option(help="Text file, or name[:config][@split] of a data set.")],
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 128,
    tokens: Annotated[int | None, typer.Option(min=2, help="Only the first so many tokens of the text.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 8,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    to_json: Json = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Measure the perplexity of a model, pruned or not, on a text."""
    progress = start(verbose)
    where, precision = device_named(device), dtype_named(dtype)
    check_file_target(to_json, "--json")
    with progress(f"load {model}"):
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        ids = read_tokens(text, tokenizer, limit=tokens)
        loaded = load_model(model, dtype=precision, device=where, trust_remote_code=trust_remote_code)
    check_finite(loaded)
    check_tokens(loaded, ids[None, :seq_len])
    found = perplexity(loaded, ids, seq_len=seq_len, batch=batch, progress=progress)
    count = sum(p.numel() for p in loaded.parameters())
    if to_json != "-":
        typer.echo(
            f"perplexity {found.value:.3f} ± {found.standard_error:.3f} ({found.tokens:,} tokens predicted in "
            f"{found.windows:,} windows of {seq_len}, {found.seconds:.1f} s)\n{model}: {count:,} parameters, {dtype}"
        )
    settings = {"model": model, "parameters": count, "text": text, "seq_len": seq_len, "dtype": dtype}
    write_json(to_json, {**settings, **dataclasses.asdict(found)})
