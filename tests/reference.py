"""The method on raw activations, as slow and as plain as its definition: what every closed form is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from slimgraph.evidence import Evidence, Source
from slimgraph.moments import Norms


@dataclass(frozen=True)
class RawSource:
    """A source projection with its input activations."""

    weight: Tensor
    units: Tensor
    x: Tensor


@dataclass(frozen=True)
class RawSite:
    """A site with its input activations: what `Evidence` sums up."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    units: Tensor
    blocks: Tensor
    sources: tuple[RawSource, ...] = ()

    def evidence(self, name: str = "site") -> Evidence:
        return Evidence(
            weight=self.weight,
            bias=self.bias,
            inputs=[self.x],
            units=self.units,
            blocks=self.blocks,
            sources=tuple(Source(s.weight, s.units, Norms.of(s.x).norms) for s in self.sources),
            kind="heads",
            name=name,
        )

    def contribution(self, unit: int) -> Tensor:
        own = self.units == unit
        return self.x[:, own] @ self.weight[:, own].T

    def output(self, units: list[int]) -> Tensor:
        """Output without bias when only `units` stay; channels of no unit always do."""
        return sum((self.contribution(unit) for unit in units), self.contribution(-1))

    @property
    def all_units(self) -> list[int]:
        return list(range(len(self.blocks)))

    @property
    def dense(self) -> Tensor:
        return self.output(self.all_units)


def random_site(
    seed: int,
    *,
    tokens: int = 60,
    out: int = 5,
    blocks: int = 2,
    block_size: int = 3,
    width: int = 2,
    loose: int = 0,
    bias: bool = True,
    sources: int = 2,
) -> RawSite:
    """A site with correlated, off-centre activations and units scattered over the channels."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    n_units = blocks * block_size
    units = torch.cat([torch.arange(n_units).repeat(width), torch.full((loose,), -1)])
    units = units[torch.randperm(len(units), generator=generator)]
    channels = len(units)
    x = randn(tokens, channels) @ randn(channels, channels) + randn(channels)
    rows = torch.cat([torch.arange(n_units).repeat(2), torch.tensor([-1])])
    return RawSite(
        x=x,
        weight=randn(out, channels),
        bias=randn(out) if bias else None,
        units=units,
        blocks=torch.arange(n_units) % blocks,
        sources=tuple(RawSource(randn(len(rows), 4), rows, randn(tokens, 4) + 1.0) for _ in range(sources)),
    )


def correlation(y: Tensor, z: Tensor) -> float:
    """Sum over columns of |Pearson correlation|; a column that does not vary counts 0."""
    total = 0.0
    for c in range(y.shape[1]):
        a, b = y[:, c] - y[:, c].mean(), z[:, c] - z[:, c].mean()
        deviations = float(a.square().mean().sqrt() * b.square().mean().sqrt())
        if deviations > 0:
            total += abs(float((a * b).mean())) / deviations
    return total


def pearson_similarity(site: RawSite) -> Tensor:
    rest = [[other for other in site.all_units if other != unit] for unit in site.all_units]
    return torch.tensor([correlation(site.output(units), site.dense) for units in rest], dtype=torch.float64)


def pearson_start(site: RawSite, keep: int) -> list[int]:
    similarity = pearson_similarity(site).tolist()
    kept = []
    for block in range(int(site.blocks.max()) + 1):
        members = [unit for unit in site.all_units if site.blocks[unit] == block]
        kept += sorted(members, key=lambda unit: similarity[unit])[:keep]
    return sorted(kept)


def pearson_search(site: RawSite, keep: int) -> tuple[list[int], float]:
    """Kept units after the greedy swaps, each tried on the full activations, and their correlation."""
    similarity = pearson_similarity(site).tolist()
    kept = pearson_start(site, keep)
    best = correlation(site.output(kept), site.dense)
    pruned = [unit for unit in site.all_units if unit not in kept]
    for unit in sorted(pruned, key=lambda unit: -similarity[unit]):
        choice = kept
        for rival in kept:
            if site.blocks[rival] != site.blocks[unit]:
                continue
            swapped = [other for other in kept if other != rival] + [unit]
            score = correlation(site.output(swapped), site.dense)
            if score > best:
                best, choice = score, swapped
        kept = choice
    return sorted(kept), best


def feature_space(site: RawSite) -> Tensor:
    y = site.dense
    centred = y - y.mean(0)
    eigenvalues, eigenvectors = np.linalg.eigh((centred.T @ centred / len(y)).numpy())
    ratio = eigenvalues / eigenvalues.mean()
    omega = 1 / (1 + np.exp(-ratio))
    scores = torch.zeros(len(site.blocks), dtype=torch.float64)
    for channel, unit in enumerate(site.units.tolist()):
        if unit < 0:
            continue
        projected = np.abs(site.weight[:, channel].numpy() @ eigenvectors) * omega
        scores[unit] += float(np.linalg.norm(projected) * np.linalg.norm(site.x[:, channel].numpy()))
    for source in site.sources:
        norms = np.linalg.norm(source.x.numpy(), axis=0)
        for row, unit in enumerate(source.units.tolist()):
            if unit >= 0:
                scores[unit] += float(np.linalg.norm(source.weight[row].numpy() * norms))
    return scores


def wanda(site: RawSite) -> Tensor:
    scores = torch.zeros(len(site.blocks), dtype=torch.float64)
    for channel, unit in enumerate(site.units.tolist()):
        if unit >= 0:
            scores[unit] += float((site.weight[:, channel].abs() * site.x[:, channel].norm()).sum())
    return scores


def magnitude(site: RawSite) -> Tensor:
    scores = torch.zeros(len(site.blocks), dtype=torch.float64)
    for channel, unit in enumerate(site.units.tolist()):
        if unit >= 0:
            scores[unit] += float(site.weight[:, channel].norm())
    for source in site.sources:
        for row, unit in enumerate(source.units.tolist()):
            if unit >= 0:
                scores[unit] += float(source.weight[row].norm())
    return scores


def regression(site: RawSite, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias by one `polyfit` per output channel, on the outputs with the dense bias included."""
    bias = torch.zeros(len(site.weight), dtype=torch.float64) if site.bias is None else site.bias
    y = site.x @ site.weight.T + bias
    pruned = site.x[:, channels] @ site.weight[:, channels].T
    weight, new_bias = [], []
    for c in range(y.shape[1]):
        if float(pruned[:, c].var()) == 0:
            slope, intercept = 1.0, float((y[:, c] - pruned[:, c]).mean())
        else:
            slope, intercept = np.polyfit(pruned[:, c].numpy(), y[:, c].numpy(), 1)
        weight.append(site.weight[c, channels] * float(slope))
        new_bias.append(float(intercept))
    return torch.stack(weight), torch.tensor(new_bias, dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn, least: int = 20, most: int = 60) -> tuple[RawSite, Tensor]:
    """A site of so many tokens, and the channels that stay of it."""
    site = random_site(
        draw(st.integers(0, 2**31)),
        tokens=draw(st.integers(least, most)),
        out=draw(st.integers(1, 6)),
        width=draw(st.integers(1, 3)),
        loose=draw(st.integers(0, 2)),
        bias=draw(st.booleans()),
    )
    kept = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5, unique=True))
    return site, site.evidence().kept_channels(torch.tensor(kept))


@st.composite
def sites(draw: st.DrawFn, least: int = 20, blocks: int = 3, width: int | None = None) -> RawSite:
    """A site of at least so many tokens and at most so many blocks, with units of that many channels or of any."""
    return random_site(
        draw(st.integers(0, 2**31)),
        tokens=draw(st.integers(least, 60)),
        out=draw(st.integers(1, 6)),
        blocks=draw(st.integers(1, blocks)),
        block_size=draw(st.integers(2, 4)),
        width=width or draw(st.integers(1, 3)),
        loose=draw(st.integers(0, 2)),
        bias=draw(st.booleans()),
        sources=draw(st.integers(0, 2)),
    )
