"""What is known about a site at the moment of the decision: the input of every score and every fit.

The sweep gathers it, the passes only read it; nothing in it refers to a graph or a module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.moments import Moments

__all__ = ["Evidence", "Source"]


@dataclass(frozen=True)
class Source:
    """One projection that produces the units of a site (for instance the gate of a gated feed-forward block).

    Attributes:
        weight: (rows, in_features), the projection's rows, in its own dtype.
        units: (rows,) int64, the unit that each row belongs to, or -1 for a row that belongs to none.
        input_norms: (in_features,) float64, L2 norm over the calibration tokens of each input feature.
    """

    weight: Tensor
    units: Tensor
    input_norms: Tensor


@dataclass(frozen=True)
class Evidence:
    """Weight, units and streamed statistics of one site.

    Attributes:
        weight: (out_features, channels), the site's output projection, float32 or float64.
        bias: (out_features,) or None.
        moments: of the site's input, over `channels`.
        units: (channels,) int64, the unit that each input channel belongs to, or -1 for a channel that always stays.
        blocks: (n_units,) int64, the block of each unit, numbered 0, 1, ... without gaps. Every block keeps the same
            number of units: one block for feed-forward channels and whole kv groups, one per kv group for balanced
            heads.
        sources: the projections that produce the units.
        kind: "heads" or "channels": what the units are.
        name: where, for messages.
    """

    weight: Tensor
    bias: Tensor | None
    moments: Moments
    units: Tensor
    blocks: Tensor
    sources: tuple[Source, ...]
    kind: str
    name: str

    def kept_channels(self, kept: Tensor) -> Tensor:
        """Channels that stay when only `kept` units stay.

        Args:
            kept: (n_kept,) int64 unit indices.

        Returns:
            (n_channels_kept,) int64, ascending.
        """
        stays = self.units.new_zeros(len(self.blocks) + 1, dtype=torch.bool)
        stays[kept] = True
        stays[-1] = True  # unit -1: belongs to no unit, always stays
        return stays[self.units].nonzero().flatten()
