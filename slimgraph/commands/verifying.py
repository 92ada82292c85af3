"""`slimgraph verify`: every invariant of a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from slimgraph.commands.options import Json, Trust, Verbose, check_file_target, start, write_json
from slimgraph.debug.verify import verify

__all__ = ["verify_command"]


def verify_command(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Directory of a checkpoint.")],
    against: Annotated[
        str | None, typer.Option(help="The model it was pruned from, the first one or one in between.")
    ] = None,
    to_json: Json = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Check every invariant of a checkpoint; the exit code is 1 when one does not hold."""
    progress = start(verbose)
    check_file_target(to_json, "--json")
    found = verify(model, against=against, trust_remote_code=trust_remote_code, progress=progress)
    if to_json != "-":
        typer.echo(repr(found))
    write_json(to_json, found.to_dict())
    if not found.ok:
        raise typer.Exit(1)
