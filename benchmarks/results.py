"""The table of docs/results.md: one model, several methods and ratios, perplexity and pruning time.

    python benchmarks/results.py --model DIR --calibration FILE --text FILE

Writes the table between the markers of docs/results.md, row by row as it gets them. Each method prunes once; the pruned
model is evaluated from memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimgraph
from slimgraph.passes import (
    CosineAllocation,
    FeatureSpace,
    NoRecovery,
    Pearson,
    Regression,
    Sweep,
    UniformAllocation,
    Verify,
    WandaSp,
)
from slimgraph.perplexity import perplexity
from slimgraph.pretrained import load_model, load_tokenizer
from slimgraph.progress import Progress
from slimgraph.recipe import Recipe, method
from slimgraph.text import calibration_tokens, read_tokens

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def _preset(name: str, **options: Any) -> Callable[[float], Recipe]:
    return lambda ratio: method(name, ratio, **options)


def _wanda_where_slimllm_cuts(ratio: float) -> Recipe:
    return Recipe((WandaSp(), NoRecovery(), CosineAllocation(ratio=ratio), Sweep(), Verify()))


def _slimllm_everywhere(ratio: float) -> Recipe:
    return Recipe((Pearson(), FeatureSpace(), Regression(), UniformAllocation(ratio=ratio), Sweep(), Verify()))


METHODS: list[tuple[str, Callable[[float], Recipe]]] = [
    ("random", _preset("random")),
    ("magnitude", _preset("magnitude")),
    ("Wanda-sp", _preset("wanda")),
    ("Wanda-sp, SlimLLM's ratios per layer", _wanda_where_slimllm_cuts),
    ("SlimLLM, all layers alike", _slimllm_everywhere),
    ("SlimLLM, no recovery", _preset("slimllm", recovery="no_recovery")),
    ("SlimLLM, bias only", _preset("slimllm", recovery="bias_only")),
    ("**SlimLLM**", _preset("slimllm")),
    ("SlimLLM, heads=kv", _preset("slimllm", heads="kv")),
]


@dataclass
class Row:
    ratio: str
    method: str
    parameters: int
    removed: float
    perplexity: str
    seconds: str


@dataclass
class Bench:
    model: nn.Module
    ids: torch.Tensor
    test: torch.Tensor
    progress: Progress = field(default_factory=lambda: Progress(enabled=True))

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def rows(self, ratios: list[float]) -> Iterator[Row]:
        yield Row("-", "dense", self.size, 0.0, self.measure(self.model), "-")
        for ratio in ratios:
            for label, recipe_for in METHODS:
                start = time.perf_counter()
                result = slimgraph.prune(self.model, self.ids, recipe=recipe_for(ratio), progress=self.progress)
                spent = time.perf_counter() - start
                if result.model is None:
                    raise SystemExit(f"{label}: {result.module_failure}")
                after = result.parameters_after
                found = self.measure(result.model)
                yield Row(f"{ratio:.0%}", label, after, 1 - after / self.size, found, f"{spent:.0f}")

    def measure(self, model: nn.Module) -> str:
        found = perplexity(model, self.test, seq_len=self.ids.shape[1], progress=self.progress)
        return f"{found.value:.2f} ± {found.standard_error:.2f}"


def markdown(rows: list[Row], settings: str) -> str:
    lines = [
        settings,
        "",
        "| asked | method | parameters | removed | perplexity | seconds to prune |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(f"| {r.ratio} | {r.method} | {r.parameters:,} | {r.removed:.2%} | {r.perplexity} | {r.seconds} |")
    return "\n".join(lines)


def write_between_markers(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} lacks the markers {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def describe(options: argparse.Namespace, model: nn.Module, test: torch.Tensor) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("slimgraph", "torch", "transformers")
    )
    command = (
        f"python benchmarks/results.py --model {options.model.name} --calibration {options.calibration.name} "
        f"--text {options.text.name} --tokens {options.tokens} --samples {options.samples} "
        f"--seq-len {options.seq_len} --seed {options.seed} --ratios {' '.join(map(str, options.ratios))}"
    )
    return (
        f"{type(model).__name__} `{options.model.name}`, float32. Calibration: {options.samples} windows of "
        f"{options.seq_len} tokens drawn from `{options.calibration.name}` (seed {options.seed}). Evaluation: the "
        f"first {len(test):,} tokens of `{options.text.name}` in windows of {options.seq_len}.\n"
        f"Made by `{command}` with {versions}, Python {platform.python_version()}, on {os.cpu_count()} CPU cores that "
        "other work shared: the seconds are rough."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the dense checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--text", type=Path, required=True, help="text file for the evaluation")
    parser.add_argument("--tokens", type=int, default=32768, help="evaluate on the first so many tokens")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "results.md")
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.model)
    sampling = {"samples": options.samples, "seq_len": options.seq_len, "seed": options.seed}
    ids = calibration_tokens(options.calibration, tokenizer, **sampling)
    test = read_tokens(options.text, tokenizer, limit=options.tokens)
    model = load_model(options.model)
    settings = describe(options, model, test)
    rows: list[Row] = []
    for row in Bench(model, ids, test).rows(options.ratios):
        rows.append(row)
        print(row, flush=True)
        write_between_markers(options.out, markdown(rows, settings))


if __name__ == "__main__":
    main()
