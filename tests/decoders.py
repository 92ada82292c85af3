"""Tiny random decoders in float64, traced once per configuration, and plain references of what pruning them means."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from slimgraph.groups import Structure, infer
from slimgraph.trace import trace

VOCABULARY = 40

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
MANY_HEADS = {"num_attention_heads": 12, "num_key_value_heads": 3}
"""Changes to a configuration: four heads in each kv group."""

GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 20}
NEOX = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "rotary_pct": 0.5,
    "max_position_embeddings": 64,
}
PHI3 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA3 = {**LLAMA, "sliding_window": 32}

FAMILIES: dict[str, tuple[type[Any], type[Any], Mapping[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA),
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, NEOX),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA3),
    "phi3": (Phi3Config, Phi3ForCausalLM, PHI3),
}


@dataclass(frozen=True)
class Decoder:
    """A model with its graph and structure. Shared between tests: not to be changed."""

    model: nn.Module
    graph: fx.GraphModule
    structure: Structure


def make(family: str = "llama", *, seed: int = 0, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """A random model, in evaluation mode. Biases and norm weights are random too, so that nothing drops out."""
    config, cls, settings = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config(**{**settings, **changes}, attn_implementation=attention)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@functools.cache
def decoder(family: str = "llama", **changes: Any) -> Decoder:
    model = make(family, **changes)
    graph = trace(model)
    return Decoder(model, graph, infer(graph))


def own_graph(made: Decoder) -> fx.GraphModule:
    """A graph that a test may change; its weights are the decoder's."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(made.graph.graph, {}))
    return fx.GraphModule(made.graph, graph).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids) if isinstance(model, fx.GraphModule) else model(input_ids=ids, use_cache=False).logits
    assert isinstance(found, Tensor)
    return found


class Toy(nn.Module):
    """An embedding, some layers that are given, and an output projection."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(8, VOCABULARY)
        self.double().eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())
