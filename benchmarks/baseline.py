"""One LLaMA-7B-shaped layer: scores, search and fit against a plain implementation of the same formulas.

    python benchmarks/baseline.py                                                       # 8 minutes or more, 5 GB
    python benchmarks/baseline.py --hidden 512 --intermediate 1376 --heads 8 --tokens 1024

The plain side is what the formulas of SlimLLM (arXiv 2505.22689) say, word by word, on raw activations: the outputs of
all kept heads are summed again for every swap that is tried, the covariance of the output goes through a general
eigen-solver, and every output channel is fitted by a call of `numpy.polyfit`. Slimgraph's side computes the same from
second moments. Both must keep the same units and fit the same projection.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from machine import footer
from torch import Tensor

from slimgraph.evidence import Evidence, Source
from slimgraph.moments import Norms
from slimgraph.recover import regression
from slimgraph.score import feature_space, pearson_select, select_top

T = TypeVar("T")


# ---- the plain side ----


def select_heads(X: Tensor, W: Tensor, heads: int, keep: int) -> Tensor:
    """Heads to keep by Pearson similarity and greedy swaps, on the outputs of every head.

    Args:
        X: (tokens, channels), the input of the attention's output projection, head by head.
        W: (out, channels), its weight.
        heads: number of heads.
        keep: of them.

    Returns:
        (keep,) int64, ascending.
    """
    width = X.shape[1] // heads
    columns = [slice(i * width, (i + 1) * width) for i in range(heads)]
    outputs = torch.stack([X[:, c] @ W[:, c].T for c in columns])  # (heads, tokens, out)
    dense = outputs.sum(0)
    similarity = torch.tensor([_similarity(dense - output, dense) for output in outputs])
    order = similarity.argsort().tolist()  # the least similar without them first: those matter most
    kept, pruned = order[:keep], order[keep:]
    best = _similarity(outputs[kept].sum(0), dense)
    for candidate in reversed(pruned):
        tried = [[*kept[:place], candidate, *kept[place + 1 :]] for place in range(keep)]
        scores = [_similarity(outputs[swapped].sum(0), dense) for swapped in tried]
        place = max(range(keep), key=scores.__getitem__)
        if scores[place] > best:
            kept, best = tried[place], scores[place]
    return torch.tensor(sorted(kept))


def select_channels(X: Tensor, W: Tensor, sources: Sequence[tuple[Tensor, Tensor]], keep: int) -> Tensor:
    """Feed-forward channels to keep by their importance in the feature space of the output.

    Args:
        X: (tokens, channels), the input of the down projection.
        W: (out, channels), its weight.
        sources: weight (channels, features) and input (tokens, features) of every projection that makes the channels.
        keep: number of channels.

    Returns:
        (keep,) int64, ascending.
    """
    Y = X @ W.T
    centred = Y - Y.mean(0)
    values, vectors = torch.linalg.eig(centred.T @ centred / len(Y))
    values, vectors = values.real, vectors.real
    directions = torch.sigmoid(values / values.mean())
    importance = ((W.T @ vectors).abs() * directions).norm(dim=1) * X.norm(dim=0)
    for weight, inputs in sources:
        importance = importance + (weight * inputs.norm(dim=0)).norm(dim=1)
    return importance.argsort(descending=True)[:keep].sort().values


def regress(Y: Tensor, Y_pruned: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of every output channel by ordinary least squares, one channel after the other.

    Args:
        Y: (tokens, out), the dense output.
        Y_pruned: (tokens, out), that of the kept units.

    Returns:
        (out,) slopes and (out,) intercepts, float64.
    """
    pairs = zip(Y_pruned.T.numpy(), Y.T.numpy(), strict=True)
    fits = np.array([np.polyfit(x, y, 1) for x, y in pairs], dtype=np.float64)
    return torch.from_numpy(fits[:, 0].copy()), torch.from_numpy(fits[:, 1].copy())


def _similarity(output: Tensor, dense: Tensor) -> float:
    """Sum over the output channels of |Pearson correlation over the tokens|."""
    a, b = output - output.mean(0), dense - dense.mean(0)
    return float(((a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()).abs().sum())


# ---- Slimgraph's side ----


def evidence(
    X: Tensor,
    W: Tensor,
    units: Tensor,
    kind: str,
    sources: Sequence[tuple[Tensor, Tensor]] = (),
    precision: torch.dtype = torch.float64,
) -> Evidence:
    """What the sweep knows of a site with this input and weight; arguments as above, `units` the unit per channel."""
    return Evidence(
        weight=W,
        bias=None,
        inputs=[X],
        units=units,
        blocks=torch.zeros(int(units.max()) + 1, dtype=torch.int64),
        sources=tuple(Source(weight, units, Norms.of(inputs).norms) for weight, inputs in sources),
        kind=kind,
        name=kind,
        precision=precision,
    )


# ---- the layer ----


@dataclass(frozen=True)
class Layer:
    """Random weights and activations of one layer.

    Attributes:
        attention, feed_forward: (tokens, channels) inputs of the two output projections.
        o, down: (hidden, channels), the projections.
        normed: (tokens, hidden), input of gate and up.
        gate, up: (intermediate, hidden).
        heads: number of heads.
    """

    attention: Tensor
    feed_forward: Tensor
    o: Tensor
    down: Tensor
    normed: Tensor
    gate: Tensor
    up: Tensor
    heads: int


def random_layer(hidden: int, intermediate: int, heads: int, tokens: int, seed: int = 0) -> Layer:
    """A layer with weights of standard deviation 0.02 and correlated activations whose channels differ in strength."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def activations(channels: int) -> Tensor:
        rank = max(1, min(tokens, channels) // 16)
        shared = normal(tokens, rank) @ normal(rank, channels) / rank**0.5
        strength = torch.exp(0.5 * normal(channels))
        return (shared + 0.5 * normal(tokens, channels) + 0.2 * normal(channels)) * strength

    return Layer(
        attention=activations(hidden),
        feed_forward=activations(intermediate),
        o=0.02 * normal(hidden, hidden),
        down=0.02 * normal(hidden, intermediate),
        normed=activations(hidden),
        gate=0.02 * normal(intermediate, hidden),
        up=0.02 * normal(intermediate, hidden),
        heads=heads,
    )


@dataclass(frozen=True)
class Outcome:
    """What one side decided and fitted at a site: kept channels of the projection, its new weight and its bias."""

    kept: Tensor
    weight: Tensor
    bias: Tensor


def plain_attention(layer: Layer, keep: int) -> Outcome:
    kept = select_heads(layer.attention, layer.o, layer.heads, keep)
    width = layer.attention.shape[1] // layer.heads
    return _plain_fit(layer.attention, layer.o, (kept[:, None] * width + torch.arange(width)).flatten())


def plain_feed_forward(layer: Layer, keep: int) -> Outcome:
    sources = [(layer.gate, layer.normed), (layer.up, layer.normed)]
    return _plain_fit(layer.feed_forward, layer.down, select_channels(layer.feed_forward, layer.down, sources, keep))


def _plain_fit(X: Tensor, W: Tensor, channels: Tensor) -> Outcome:
    slopes, intercepts = regress(X @ W.T, X[:, channels] @ W[:, channels].T)
    return Outcome(channels, slopes[:, None] * W[:, channels], intercepts)


def our_attention(layer: Layer, keep: int, precision: torch.dtype = torch.float64) -> Outcome:
    units = torch.arange(layer.heads).repeat_interleave(layer.attention.shape[1] // layer.heads)
    found = evidence(layer.attention, layer.o, units, "heads", precision=precision)
    channels = found.kept_channels(pearson_select(found, keep))
    return Outcome(channels, *regression(found, channels))


def our_feed_forward(layer: Layer, keep: int, precision: torch.dtype = torch.float64) -> Outcome:
    units = torch.arange(layer.feed_forward.shape[1])
    sources = [(layer.gate, layer.normed), (layer.up, layer.normed)]
    found = evidence(layer.feed_forward, layer.down, units, "channels", sources, precision)
    channels = found.kept_channels(select_top(feature_space(found), found.blocks, keep))
    return Outcome(channels, *regression(found, channels))


# ---- the comparison ----


def compare(plain: Outcome, ours: Outcome) -> tuple[bool, float]:
    """Whether the same channels stay, and the largest difference of the fits over the largest entry."""
    if not torch.equal(plain.kept, ours.kept):
        return False, float("nan")
    pairs = [(plain.weight, ours.weight), (plain.bias, ours.bias)]
    return True, max(float((a.double() - b.double()).abs().max() / a.double().abs().max()) for a, b in pairs)


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """What it returns, its seconds, and its seconds of all cores together."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the heads and channels that goes")
    parser.add_argument("--repetitions", type=int, default=3, help="of Slimgraph's side; the fastest counts")
    parser.add_argument("--precision", choices=["float64", "float32"], default="float64", help="of Slimgraph's solves")
    given = parser.parse_args()
    precision = getattr(torch, given.precision)
    layer = random_layer(given.hidden, given.intermediate, given.heads, given.tokens)
    keep_heads = given.heads - round(given.ratio * given.heads)
    keep_channels = given.intermediate - round(given.ratio * given.intermediate)
    parts = [
        ("attention", plain_attention, our_attention, keep_heads),
        ("feed-forward", plain_feed_forward, our_feed_forward, keep_channels),
    ]
    print("| site | plain s | CPU s | Slimgraph s | CPU s | ratio | same units | largest difference |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    totals = np.zeros(4)
    for name, plain, ours, keep in parts:
        runs = [timed(lambda ours=ours, keep=keep: ours(layer, keep, precision)) for _ in range(given.repetitions)]
        ours_outcome, *ours_seconds = min(runs, key=lambda run: run[1])
        plain_outcome, *plain_seconds = timed(lambda plain=plain, keep=keep: plain(layer, keep))
        same, difference = compare(plain_outcome, ours_outcome)
        seconds = np.array([*plain_seconds, *ours_seconds])
        totals += seconds
        print(_row(name, seconds, f"{'yes' if same else 'no'} | {difference:.1e}"), flush=True)
    print(_row("both", totals, " | "))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\nHidden {given.hidden}, intermediate {given.intermediate}, {given.heads} heads, {given.tokens} tokens in "
        f"float32, Slimgraph's solves in {given.precision}, {given.ratio:.0%} of the units go; "
        f"peak {peak:.1f} GiB. {footer()}"
    )


def _row(name: str, seconds: np.ndarray, rest: str) -> str:
    plain, plain_cpu, ours, ours_cpu = seconds
    return f"| {name} | {plain:.1f} | {plain_cpu:.1f} | {ours:.2f} | {ours_cpu:.2f} | {plain / ours:.0f}x | {rest} |"


if __name__ == "__main__":
    main()
