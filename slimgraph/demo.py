"""The demo: a small model pruned for real, with everything measured, and loaded again by another process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slimgraph import checkpoint
from slimgraph.debug.report import report, table
from slimgraph.errors import CheckpointError, ModelError
from slimgraph.passes import ApplyPlan
from slimgraph.perplexity import Perplexity, perplexity
from slimgraph.pipeline import Result, prune
from slimgraph.pretrained import demo_model, load_model, load_tokenizer
from slimgraph.progress import Progress, Stopwatch
from slimgraph.recipe import Recipe
from slimgraph.text import calibration_tokens, demo_texts, start_tokens, tokenize

__all__ = ["OUT", "run"]

OUT = Path("models/smollm2-135m-20")
PROMPT = "The main reason why people write programs is"

_SEQ_LEN = 128
_NEW_TOKENS = 32


@dataclass(frozen=True)
class _Row:
    name: str
    parameters: int
    measured: Perplexity


def run(
    progress: Progress,
    *,
    out: Path | None = None,
    model: str | None = None,
    ratio: float = 0.2,
    samples: int = 32,
    tokens: int = 6144,
    force: bool = False,
) -> None:
    """Prune, compare, save, load again; prints what it sees.

    Args:
        progress: shows the long stages.
        out: for the checkpoint; the default place is replaced, any other only with `force`.
        model: directory or hub name, instead of the demo's model.
        ratio: share of all parameters that goes.
        samples: calibration windows.
        tokens: of the evaluation text.
        force: replace a checkpoint at `out`.

    Raises:
        SlimgraphError: bad input, or the checkpoint does not give the same numbers again.
    """
    place = OUT if out is None else out
    force = force or out is None
    checkpoint.check_target(place, force=force)
    watch = Stopwatch()
    with watch("load"), progress("load"):
        source = model or str(demo_model(progress=progress))
        dense = load_model(source)
        tokenizer = load_tokenizer(source)
        calibration, evaluation = demo_texts()
        ids = calibration_tokens([calibration], tokenizer, samples=samples, seq_len=_SEQ_LEN)
        start = start_tokens(tokenizer)
        test = tokenize(evaluation, tokenizer, special=not start)[:tokens]
    _say(f"model        {source}")
    _say(f"text         the Python language reference: {ids.numel():,} tokens to calibrate, {len(test):,} to evaluate")

    rows = [_measure("dense", dense, test, start, progress)]
    notes = {"model": source, "calibration": "prose of the Python language reference"}
    result = prune(dense, ids, ratio, recipe="slimllm", notes=notes, progress=progress, watch=watch)
    same_cut = Recipe((ApplyPlan(plan=result.plan.to_dict()),))
    bare = prune(dense, ids, recipe=same_cut, progress=progress)
    rows.append(_measure("pruned, without recovery", _module(bare), test, start, progress))
    rows.append(_measure("pruned, with recovery", _module(result), test, start, progress))
    with watch("save"), progress("save"):
        result.save(place, tokenizer=tokenizer, force=force)
    result.seconds = watch.stages()

    _say(f"\n{report(result, inner=watch.outer())}\n")
    _say(_comparison(rows))
    with progress("generate"):
        _say(f"\ndense        {_sentence(dense, tokenizer)}")
        _say(f"pruned       {_sentence(_module(result), tokenizer)}")
    _say(f"\ncheckpoint   {place.resolve()}")
    with progress("load in another process"):
        _say(_load_again(place, _module(result), test, start, rows[-1].measured))


def _say(text: str) -> None:
    print(text, flush=True)  # in order with the progress on standard error


def _measure(name: str, model: nn.Module, test: Tensor, start: list[int], progress: Progress) -> _Row:
    measured = perplexity(model, test, seq_len=_SEQ_LEN, start=start, progress=progress)
    return _Row(name, sum(p.numel() for p in model.parameters()), measured)


def _module(result: Result) -> nn.Module:
    if result.model is None:
        raise ModelError(f"{result.module_failure}; nothing was written")
    return result.model


def _comparison(rows: list[_Row]) -> str:
    cells = [
        [row.name, f"{row.parameters:,}", f"{row.measured.value:.2f} ± {row.measured.standard_error:.2f}"]
        for row in rows
    ]
    return table(["", "parameters", "perplexity"], cells)


def _sentence(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(
            prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.2,
        )
    return " ".join(str(tokenizer.decode(made[0], skip_special_tokens=True)).split())


# ---- the other process ----

_AGAIN = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import slimgraph
from slimgraph.perplexity import perplexity

directory, tensors, seq_len, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
given = load_file(tensors)
model = AutoModelForCausalLM.from_pretrained(directory).eval()
with torch.no_grad():
    logits = model(given["test"][None, :seq_len]).logits[0]
difference = float((logits - given["logits"]).abs().max())
measured = perplexity(model, given["test"], seq_len=seq_len, start=start)
print(json.dumps({"difference": difference, "perplexity": measured.value}))
"""


def _load_again(place: Path, model: nn.Module, test: Tensor, start: list[int], before: Perplexity) -> str:
    """What a fresh process sees that loads the checkpoint with transformers' own `from_pretrained`."""
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        tensors = Path(work) / "given.safetensors"
        logits = model(test[None, :_SEQ_LEN]).logits[0]
        save_file({"test": test.contiguous(), "logits": logits.contiguous()}, tensors)
        command = [sys.executable, "-c", _AGAIN, str(place), str(tensors), str(_SEQ_LEN), json.dumps(start)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"another process could not load {place}: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["difference"] > 1e-4 or abs(found["perplexity"] / before.value - 1) > 1e-4:
        raise CheckpointError(
            f"loaded again in another process, {place} gives the perplexity {found['perplexity']:.4f}, expected "
            f"{before.value:.4f}; its logits differ by {found['difference']:.2g}"
        )
    return (
        "loaded again by AutoModelForCausalLM.from_pretrained in another process: "
        f"perplexity {found['perplexity']:.2f}, logits differ by {found['difference']:.1e} at most"
    )
