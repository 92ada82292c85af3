"""The command line: one command per file in `slimgraph/commands`.

Results go to standard output; progress and messages to standard error. Bad input is one line there and a non-zero exit
code, 1 for what Slimgraph refuses and 2 for wrong usage; a traceback means a defect.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from slimgraph.allocator import keep_freed_memory
from slimgraph.commands.benchmarking import bench_command
from slimgraph.commands.comparing import compare_command
from slimgraph.commands.demonstration import demo_command
from slimgraph.commands.differing import bisect_command, diff_command
from slimgraph.commands.evaluation import eval_command
from slimgraph.commands.finetuning import finetune_command
from slimgraph.commands.inspecting import explain_command, inspect_command
from slimgraph.commands.pruning import prune_command
from slimgraph.commands.reporting import report_command
from slimgraph.commands.running import run_command
from slimgraph.commands.verifying import verify_command
from slimgraph.errors import SlimgraphError

__all__ = ["app", "main"]

_INTERRUPTED = 130  # exit code of a program that was stopped by Ctrl-C

app = typer.Typer(
    name="slimgraph",
    help="Make decoder language models smaller: structured pruning inferred from the traced graph.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process.

    Args:
        arguments: those of the process by default.
    """
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given or ["--help"], standalone_mode=False)
        sys.stdout.flush()  # here, where it is said if it fails
    except SlimgraphError as error:
        return _complain(str(error), 1)
    except typer.exceptions.TyperException as error:  # wrong usage
        return _complain(f"{error.format_message().rstrip('.')} (see slimgraph --help)", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped", _INTERRUPTED)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _unread()
    except BrokenPipeError:
        return _unread()
    except OSError as error:  # like a full disk under a redirected output; what is ours to write says more
        _drop_output()
        return _complain(f"{error}; free space or write elsewhere", 1)
    if code == _INTERRUPTED:  # which is what an interrupt has become here
        return _complain("stopped", code)
    return code if isinstance(code, int) else 0


def _unread() -> int:
    """Whoever read the output has enough."""
    _drop_output()
    sys.stderr.close()
    return 141


def _drop_output() -> None:
    """What could not be written is not tried again at exit."""
    with contextlib.suppress(OSError):  # not a file of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, code: int) -> int:
    print(f"slimgraph: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slimgraph {importlib.metadata.version('slimgraph')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version and exit.")
    ] = False,
) -> None:
    """Make decoder language models smaller: structured pruning inferred from the traced graph."""
    keep_freed_memory()


app.command("inspect")(inspect_command)
app.command("explain")(explain_command)
app.command("prune")(prune_command)
app.command("finetune")(finetune_command)
app.command("eval")(eval_command)
app.command("bench")(bench_command)
app.command("compare")(compare_command)
app.command("run")(run_command)
app.command("diff")(diff_command)
app.command("bisect")(bisect_command)
app.command("verify")(verify_command)
app.command("report")(report_command)
app.command("demo")(demo_command)
