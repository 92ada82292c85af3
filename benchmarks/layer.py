"""Where a layer's time goes at the shape of LLaMA-7B: every statistic, score and fit of its two sites in turn.

    python benchmarks/layer.py

Random bfloat16 activations and weights, 4,096 tokens, a quarter of the units goes, as a streamed run with
`--dtype bfloat16` sees them. Statistics are kept once they are there, so each line is without those above it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from machine import footer

from slimgraph import recover, score
from slimgraph.allocator import keep_freed_memory
from slimgraph.evidence import Evidence, Source, precision_for

TOKENS, WIDTH, CHANNELS, HEADS = 4096, 4096, 11008, 32
DTYPE = torch.bfloat16

T = TypeVar("T")


def timed(what: str, function: Callable[[], T]) -> T:
    start = time.perf_counter()
    found = function()
    print(f"| {what} | {time.perf_counter() - start:.2f} |", flush=True)
    return found


def evidence(channels: int, units: int, sources: int) -> Evidence:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = randn(TOKENS, 512) @ randn(512, channels) * 0.05 + randn(TOKENS, channels)
    of_unit = torch.arange(channels) // (channels // units)
    weights = [(randn(channels, WIDTH) * 0.02).to(DTYPE) for _ in range(sources)]
    return Evidence(
        weight=(randn(WIDTH, channels) * 0.02).to(DTYPE),
        bias=None,
        inputs=[x.to(DTYPE).view(-1, 128, channels)],
        units=of_unit,
        blocks=torch.zeros(units, dtype=torch.long),
        sources=tuple(Source(w, of_unit, torch.ones(WIDTH, dtype=torch.float64)) for w in weights),
        kind="heads" if units == HEADS else "channels",
        name="site",
        precision=precision_for(DTYPE),
    )


def main() -> None:
    keep_freed_memory()
    print("| attention, 32 heads | seconds |\n|---|--:|")
    site = evidence(WIDTH, HEADS, 0)
    timed("norms", lambda: site.norms)
    timed("second moments of the input", lambda: site.moments)
    timed("covariances of all pairs of heads", lambda: site.contributions)
    kept = timed("similarities and swap search", lambda: score.pearson_select(site, HEADS * 3 // 4))
    timed("regression", lambda: recover.regression(site, site.kept_channels(kept)))

    print("\n| feed-forward, 11,008 channels | seconds |\n|---|--:|")
    site = evidence(CHANNELS, CHANNELS, 2)
    timed("norms", lambda: site.norms)
    timed("second moments of the output", lambda: site.output)
    form = timed("eigenvalues and -vectors of these", lambda: score._importance_form(site.output, site.precision))
    timed("importance of the columns", lambda: score._weighted_columns(site.weight, form, site.precision))
    timed("importance of the source rows", lambda: score._source_scores(site, activations=True))
    kept = score.select_top(score.feature_space(site, directions=False), site.blocks, CHANNELS * 3 // 4)
    channels = site.kept_channels(kept)
    weight, bias = timed("regression", lambda: recover.regression(site, channels))
    assert bias is not None
    timed("the new output", lambda: torch.nn.functional.linear(site.inputs[0][..., channels], weight, bias))

    print("\n| products of 4,096 x 4,096 | TFLOP/s |\n|---|--:|")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        square = torch.randn(WIDTH, WIDTH).to(dtype)
        square @ square
        start = time.perf_counter()
        square @ square
        print(f"| {dtype} | {2 * WIDTH**3 / (time.perf_counter() - start) / 1e12:.2f} |")
    print(f"\n{footer()}")


if __name__ == "__main__":
    main()
