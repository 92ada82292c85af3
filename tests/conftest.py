"""What several tests need: a tiny model and a tiny tokenizer. Nothing waits for a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub's client
# Else, on some processors, the last bits of a product depend on where in memory its matrices lie.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()  # what a test saves must not show in what a command writes

# The same examples in every run; `--hypothesis-profile default` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

VOCABULARY = 64
WORDS = ["the", "a", "cat", "dog", "tree", "house", "sits", "runs", "sees", "under", "old", "new", "and", "is"]


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a random LLaMA of two layers, the same for the same arguments: `tiny_llama(seed=0, **configuration)`."""

    def make(seed: int = 0, **configuration: Any) -> LlamaForCausalLM:
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(settings | configuration))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with line ends; its ids fit the vocabulary of `tiny_llama`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<unk>", "\n", ".", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\.|[^\s.]+"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
