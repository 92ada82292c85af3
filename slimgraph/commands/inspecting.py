"""`slimgraph inspect` and `slimgraph explain`: what is in a model, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgraph.commands.options import Json, Model, Trust, Verbose, check_file_target, start, write_json, write_text
from slimgraph.debug import inspect as inspect_model
from slimgraph.debug.export import node_data, to_dot, to_graphml
from slimgraph.explain import explain
from slimgraph.groups import infer
from slimgraph.pretrained import load_model
from slimgraph.trace import trace

__all__ = ["explain_command", "inspect_command"]


def inspect_command(
    model: Model,
    to_json: Json = None,
    graphml: Annotated[Path | None, typer.Option(help="Write groups and tensors there as GraphML.")] = None,
    dot: Annotated[Path | None, typer.Option(help="Write groups and tensors there for Graphviz.")] = None,
    overlay: Annotated[
        Path | None, typer.Option("--node-data", help="Write units at every node there, for Model Explorer.")
    ] = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Show what can be removed from a model, what is tied together, and what is frozen and why. Reads no weights."""
    progress = start(verbose)
    check_file_target(to_json, "--json")
    for option, target in (("--graphml", graphml), ("--dot", dot), ("--node-data", overlay)):
        check_file_target(target, option)
    with progress(f"trace {model}"):
        found = inspect_model(model, trust_remote_code=trust_remote_code)
    if to_json != "-":
        typer.echo(repr(found))
    write_json(to_json, found.to_dict())
    if graphml is not None:
        write_text(graphml, to_graphml(found.structure))
    if dot is not None:
        write_text(dot, to_dot(found.structure))
    if overlay is not None:
        write_json(str(overlay), node_data(found.structure))


def explain_command(
    model: Model,
    what: Annotated[str, typer.Argument(metavar="PARAMETER[DIM]", help="Like decoder.0.out.weight[1].")],
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Show which slices of other parameters a dimension is coupled to, or why it is frozen, and which nodes say so."""
    progress = start(verbose)
    with progress(f"trace {model}"):
        structure = infer(trace(load_model(model, meta=True, trust_remote_code=trust_remote_code)))
    for explanation in explain(structure, what):
        typer.echo(str(explanation))
