"""A pruning that went wrong, and how to find out where.

python examples/debugging/find_the_fault.py

A tiny model is pruned, and one line of "custom surgery" then mixes up two rows of one projection, as an index that is
off by one would. The model still runs and its loss hardly moves. Four questions lead to the fault.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slimgraph
from slimgraph.debug import bisect, diff

VOCABULARY = 64


def make() -> tuple[LlamaForCausalLM, slimgraph.Result, Any]:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=3, **shape)).eval()
    recipe = slimgraph.method("wanda", 0.2, recovery="regression", round_to=4)
    result = slimgraph.prune(dense, torch.randint(VOCABULARY, (8, 16)), recipe=recipe)
    broken = copy.deepcopy(result.model)
    with torch.no_grad():
        rows = broken.model.layers[1].mlp.up_proj.weight
        rows[[3, 4]] = rows[[4, 3]].clone()  # the fault
    return dense, result, broken


def main() -> None:
    dense, result, broken = make()
    tokens = torch.randint(VOCABULARY, (512,))

    print("1. Do the two models differ where they should? Shapes, sizes and attributes say nothing unusual:\n")
    difference = diff(dense, broken)
    print(repr(difference).split("\n\nGroups")[0])

    print("\n2. What does the sound model look like? It differs from the dense one only where units were cut:\n")
    sound = bisect(dense, result.model, tokens, seq_len=16, plan=result.plan)
    print(sound)

    print("\n3. And the broken one? The loss says little, the accumulated errors not much more:\n")
    found = bisect(dense, broken, tokens, seq_len=16, plan=result.plan)
    print(found)

    fault = found.faults[0]
    print(f"\n4. The first difference that pruning does not explain is the fault: {fault.module}, layer {fault.layer}.")
    weight = broken.get_submodule(fault.module).weight
    kept = result.plan.cuts["model.layers.1.mlp.down_proj.weight[1]"].keep[0]
    expected = dense.get_submodule(fault.module).weight[list(kept)]
    wrong = (weight != expected).any(1).nonzero().flatten().tolist()
    print(f"   Its rows {wrong} are not the rows {[kept[i] for i in wrong]} of the dense weight, as the plan says.")


if __name__ == "__main__":
    main()
