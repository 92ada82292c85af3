"""The command line: `slimgraph inspect | explain | prune | eval | demo`.

Results go to standard output; progress and messages to standard error. Bad input is one line there and a non-zero exit
code, 1 for what Slimgraph refuses and 2 for wrong usage; a traceback means a defect.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from slimgraph import checkpoint, demo
from slimgraph.debug import inspect as inspect_model
from slimgraph.debug import report
from slimgraph.errors import CheckpointError, ModelError, RecipeError, SlimgraphError
from slimgraph.explain import explain
from slimgraph.groups import infer
from slimgraph.perplexity import perplexity
from slimgraph.pipeline import prune as prune_model
from slimgraph.pretrained import check_finite, check_tokens, load_model, load_tokenizer
from slimgraph.progress import Progress, Stopwatch
from slimgraph.recipe import METHODS, Recipe, method
from slimgraph.text import calibration_batch, calibration_tokens, demo_texts, read_tokens, tokenize
from slimgraph.trace import trace
from slimgraph.units import HEAD_MODES

__all__ = ["app", "main"]

DTYPES = ("float32", "float64", "bfloat16", "float16")
_DEFAULT_TEXT = "prose of the Python language reference"

app = typer.Typer(
    name="slimgraph",
    help="Make decoder language models smaller: structured pruning inferred from the traced graph.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a checkpoint, or a name on the hub.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that the checkpoint brings.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what each stage does.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON there; - for standard output.")]


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
    except SlimgraphError as error:
        return _complain(str(error), 1)
    except typer.exceptions.TyperException as error:  # wrong usage
        return _complain(f"{error.format_message().rstrip('.')} (see slimgraph --help)", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped", 130)
    except BrokenPipeError:  # whoever read the output has enough
        sys.stderr.close()
        return 141
    return code if isinstance(code, int) else 0


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


@app.command("inspect")
def inspect_command(
    model: Model, to_json: Json = None, trust_remote_code: Trust = False, verbose: Verbose = False
) -> None:
    """Show what can be removed from a model, what is tied together, and what is frozen and why. Reads no weights."""
    progress = _start(verbose)
    _check_file_target(to_json, "--json")
    with progress(f"trace {model}"):
        found = inspect_model(model, trust_remote_code=trust_remote_code)
    if to_json != "-":
        typer.echo(repr(found))
    _write_json(to_json, found.to_dict())


@app.command("explain")
def explain_command(
    model: Model,
    what: Annotated[str, typer.Argument(metavar="PARAMETER[DIM]", help="Like decoder.0.out.weight[1].")],
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Show which slices of other parameters a dimension is coupled to, or why it is frozen, and which nodes say so."""
    progress = _start(verbose)
    with progress(f"trace {model}"):
        structure = infer(trace(load_model(model, meta=True, trust_remote_code=trust_remote_code)))
    for explanation in explain(structure, what):
        typer.echo(str(explanation))


@app.command("prune")
def prune_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the pruned checkpoint.")],
    ratio: Annotated[float | None, typer.Option(help="Share of all parameters that goes.  [default: 0.2]")] = None,
    method_name: Annotated[
        str | None, typer.Option("--method", help=f"One of {', '.join(METHODS)}.  [default: slimllm]")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML list of passes, instead of a method and a ratio.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help=f"Text file, or name[:config][@split] of a data set.  [default: {_DEFAULT_TEXT}]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the windows drawn and of random scores.")] = 0,
    heads: Annotated[str | None, typer.Option(help=f"{', '.join(HEAD_MODES)}: what goes of attention.")] = None,
    round_to: Annotated[int | None, typer.Option(min=1, help="Kept channels are a multiple.  [default: 8]")] = None,
    no_recovery: Annotated[bool, typer.Option("--no-recovery", help="Do not refit the output projections.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    plan: Annotated[Path | None, typer.Option(help="Also write which units stay, as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Remove a share of a model's parameters and save the smaller model."""
    progress, watch = _start(verbose), Stopwatch()
    chosen = _recipe(recipe, method_name, ratio, heads, round_to, no_recovery, seed)
    where, precision = _device(device), _dtype(dtype)
    checkpoint.check_target(out, force=force)
    _check_file_target(plan, "--plan")
    with watch("load"), progress(f"load {model}"):
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        ids = _calibration_ids(calibration, tokenizer, samples, seq_len, seed)
        dense = load_model(model, dtype=precision, device=where, trust_remote_code=trust_remote_code)
    notes = {
        "model": model,
        "method": method_name or "slimllm" if recipe is None else f"recipe {recipe.name}",
        "calibration": calibration or _DEFAULT_TEXT,
    }
    result = prune_model(
        dense, ids, recipe=chosen, heads=heads or "auto", seed=seed, notes=notes, progress=progress, watch=watch
    )
    if result.model is None:
        raise ModelError(f"{result.module_failure}; nothing was written")
    with watch("save"), progress("save"):
        result.save(out, tokenizer=tokenizer, force=force)
    if plan is not None:
        _write_text(plan, result.plan.to_json())
    result.seconds = watch.stages()
    typer.echo(
        f"{type(dense).__name__} {model}: {notes['method']}, {samples} x {seq_len} calibration tokens of "
        f"{notes['calibration']}, seed {seed}, {dtype} on {device}\n"
    )
    typer.echo(report(result, inner=watch.outer()))
    typer.echo(f"checkpoint   {out}")


@app.command("eval")
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
    progress = _start(verbose)
    where, precision = _device(device), _dtype(dtype)
    _check_file_target(to_json, "--json")
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
    _write_json(to_json, {**settings, **dataclasses.asdict(found)})


@app.command("demo")
def demo_command(
    out: Annotated[Path | None, typer.Option(help=f"For the pruned checkpoint.  [default: {demo.OUT}]")] = None,
    model: Annotated[str | None, typer.Option(help="Another model.  [default: SmolLM2-135M, fetched once]")] = None,
    ratio: Annotated[float, typer.Option(help="Share of all parameters that goes.")] = 0.2,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows of 128 tokens.")] = 32,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of the evaluation text.")] = 6144,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at --out.")] = False,
    verbose: Verbose = False,
) -> None:
    """Prune a small model for real, compare it with the dense one, save it and load it again."""
    demo.run(_start(verbose), out=out, model=model, ratio=ratio, samples=samples, tokens=tokens, force=force)


# ---- options ----


def _start(verbose: bool) -> Progress:
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


def _recipe(
    file: Path | None,
    name: str | None,
    ratio: float | None,
    heads: str | None,
    round_to: int | None,
    no_recovery: bool,
    seed: int,
) -> Recipe:
    given = {"--method": name, "--ratio": ratio, "--heads": heads, "--round-to": round_to}
    given["--no-recovery"] = no_recovery or None
    twice = [option for option, value in given.items() if value is not None]
    if file is not None:
        if twice:
            raise RecipeError(f"{twice[0]} and --recipe were both given; a recipe says that itself: leave one out")
        return Recipe.from_file(file)
    if heads is not None and heads not in HEAD_MODES:
        raise RecipeError(f"--heads is {heads!r}; expected one of {', '.join(HEAD_MODES)}")
    return method(
        name or "slimllm",
        0.2 if ratio is None else ratio,
        recovery="no_recovery" if no_recovery else None,
        heads=heads or "auto",
        round_to=round_to or 8,
        seed=seed,
    )


def _calibration_ids(source: str | None, tokenizer: Any, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    if source is not None:
        # A path here, whatever it looks like: on a command line nobody gives the text itself.
        place: str | Path = Path(source) if any(map(str.isspace, source)) else source
        return calibration_tokens(place, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    return calibration_batch(tokenize(demo_texts()[0], tokenizer), samples=samples, seq_len=seq_len, seed=seed)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"--device is {name!r}, which cannot be used here ({reason}); expected cpu or cuda") from error
    if device.type == "meta":
        raise ModelError("--device is 'meta', which has no values; expected cpu or cuda")
    return device


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(f"--dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


# ---- files ----


def _check_file_target(target: str | Path | None, option: str) -> None:
    """Before the work, so that it is not lost."""
    if target is None or target == "-":
        return
    path = Path(target)
    if path.is_dir() or not path.parent.is_dir():
        found = "is a directory" if path.is_dir() else f"lies in {path.parent}, which is no directory"
        raise CheckpointError(f"{option}: {path} {found}; give the path of a file in a directory that exists")


def _write_json(target: str | None, data: dict[str, Any]) -> None:
    if target is None:
        return
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
    text = json.dumps(finite, indent=1)
    if target == "-":
        typer.echo(text)
    else:
        _write_text(Path(target), text)


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
