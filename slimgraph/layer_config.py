"""Widths of single layers under the configuration's own names for them.

A configuration says one width for all layers; a pruned model has one per layer. Which entry of the configuration is
which width is found by value, and proved by building the class with the entry changed: a parameter must then have the
pruned model's shape. This is for people and tools that read checkpoints; loading goes by the recorded shapes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slimgraph.attributes import integers_of
from slimgraph.plan import Resolved

__all__ = ["layer_widths"]


def layer_widths(model: nn.Module, resolved: Resolved, shapes: Mapping[str, list[int]]) -> dict[int, dict[str, int]]:
    """Entries of the configuration that differ in a layer.

    Args:
        model: the dense model; one without a `config` has no entries.
        resolved: the plan.
        shapes: parameter name -> shape after the cut, for those that changed.

    Returns:
        Layer -> name in the configuration -> width in that layer.
    """
    config = getattr(model, "config", None)
    if config is None:
        return {}
    proved: dict[str, bool] = {}
    found: dict[int, dict[str, int]] = {}
    for layer, path in enumerate(resolved.structure.layers):
        changed = _changed_sizes(resolved, layer)
        for name, value in integers_of(config).items():
            after = changed.get(value, set())
            if len(after) != 1 or "." in name or value in after:
                continue
            (width,) = after
            if name not in proved:
                mine = {k: s for k, s in shapes.items() if k.startswith(f"{path}.")}
                proved[name] = _shapes_follow(model, name, width, mine)
            if proved[name]:
                # By its number among all layers, those that are skipped as well.
                found.setdefault(int(path.rpartition(".")[2]), {})[name] = width
    return found


def _changed_sizes(resolved: Resolved, layer: int) -> dict[int, set[int]]:
    """Size before -> sizes after, of the units at the layer's sites: each group alone, and heads in all."""
    sizes: dict[int, set[int]] = {}
    groups = resolved.structure.groups
    cuts = resolved.plan.cuts
    for site in resolved.structure.sites:
        if site.layer != layer:
            continue
        before = [groups[g].units for g in site.groups]
        after = [cuts[g].kept if g in cuts else groups[g].units for g in site.groups]
        for b, a in [*zip(before, after, strict=True), (math.prod(before), math.prod(after))]:
            sizes.setdefault(b, set()).add(a)
    return sizes


def _shapes_follow(model: nn.Module, name: str, width: int, shapes: Mapping[str, list[int]]) -> bool:
    """Whether the class built with that entry has, somewhere in the layer, a shape of the pruned model."""
    config: Any = copy.deepcopy(model.config)
    with contextlib.suppress(Exception):  # a configuration may refuse the value: then the entry is not this width
        setattr(config, name, width)
        with torch.device("meta"):
            built: Any = type(model)(config)
        return any(list(p.shape) == shapes[k] for k, p in built.named_parameters() if k in shapes)
    return False
