"""A score of one's own: heads and channels by how much their activations vary. Runs in seconds, without a network.

python examples/own_importance.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM

import slimgraph
from slimgraph.evidence import Evidence
from slimgraph.passes import Pass, Regression, Sweep, UniformAllocation, register
from slimgraph.score import select_top
from slimgraph.state import State


@register  # from now on recipes that this process reads may say `variance: {power: 1.0}`
@dataclass(frozen=True)
class Variance(Pass):
    """Units by the variance of their activations at the site."""

    power: float = 0.5

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Importance passes only record themselves; the sweep asks them at every site."""
        state.importance["heads"] = state.importance["channels"] = self

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        variance = evidence.moments.covariance.diagonal()
        units = evidence.units.clamp(min=0)
        scores = torch.zeros(len(evidence.blocks), dtype=torch.float64).index_add(0, units, variance**self.power)
        return select_top(scores, evidence.blocks, keep)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (16, 32))
    recipe = slimgraph.Recipe((Variance(), Regression(), UniformAllocation(ratio=0.2), Sweep()))
    result = slimgraph.prune(model, ids, recipe=recipe)
    print(result)
    print(recipe.to_yaml())


if __name__ == "__main__":
    main()
