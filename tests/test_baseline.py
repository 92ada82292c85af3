"""The plain implementation of the benchmark and Slimgraph decide and fit the same."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def baseline() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("baseline")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [2, 5])
def test_attention(baseline: Any, seed: int, keep: int, precision: torch.dtype) -> None:
    layer = baseline.random_layer(48, 96, heads=8, tokens=160, seed=seed)
    plain, ours = baseline.plain_attention(layer, keep), baseline.our_attention(layer, keep, precision)
    assert len(plain.kept) == keep * 6
    same, difference = baseline.compare(plain, ours)
    assert same
    assert difference < 1e-5


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [20, 70])
def test_feed_forward(baseline: Any, seed: int, keep: int, precision: torch.dtype) -> None:
    layer = baseline.random_layer(48, 96, heads=8, tokens=160, seed=seed)
    plain, ours = baseline.plain_feed_forward(layer, keep), baseline.our_feed_forward(layer, keep, precision)
    assert len(plain.kept) == keep
    same, difference = baseline.compare(plain, ours)
    assert same
    assert difference < 1e-5


def test_the_search_finds_more_than_the_start(baseline: Any) -> None:
    """Else the comparison of searches would compare nothing."""
    changed = 0
    for seed in range(3):
        layer = baseline.random_layer(48, 96, heads=8, tokens=160, seed=seed)
        X, W = layer.attention, layer.o
        found = baseline.evidence(X, W, torch.arange(8).repeat_interleave(6), "heads")
        start = baseline.pearson_select(found, 4, search=False)
        changed += not torch.equal(start, baseline.select_heads(X, W, 8, 4))
    assert changed


def test_a_difference_is_seen(baseline: Any) -> None:
    layer = baseline.random_layer(48, 96, heads=8, tokens=160)
    one, other = baseline.plain_attention(layer, 5), baseline.our_attention(layer, 4)
    assert not baseline.compare(one, other)[0]
    moved = baseline.Outcome(one.kept, one.weight * 1.01, one.bias)
    assert baseline.compare(one, moved)[1] > 5e-3
