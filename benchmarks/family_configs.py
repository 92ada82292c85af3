"""Tiny, asymmetric configurations of decoder families, by their name in `transformers`.

No two sizes of a model are equal by accident, so that a confusion of axes shows. Each family takes from `SIZES` what
its configuration class knows, and its own entry on top.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 60,
    "n_embd": 60,
    "d_model": 60,
    "intermediate_size": 76,
    "n_inner": 76,
    "ffn_dim": 76,
    "ffn_hidden_size": 76,
    "decoder_ffn_dim": 76,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 6,
    "num_heads": 6,
    "n_head": 6,
    "n_heads": 6,
    "attention_heads": 6,
    "decoder_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "rotary_dim": 8,
    "num_experts": 5,
    "num_local_experts": 5,
    "n_routed_experts": 5,
    "moe_num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 36,
    "shared_expert_intermediate_size": 44,
    "q_lora_rank": 22,
    "kv_lora_rank": 26,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 18,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": False,
    "sliding_window": 8,
    "is_decoder": True,
}

NO_HEAD_DIM = {"head_dim": None}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama (tied)": {"tie_word_embeddings": True},
    "llama (MHA)": {"num_key_value_heads": 6},
    "llama (MQA)": {"num_key_value_heads": 1},
    "mistral": {},
    "ministral": {},
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {"hidden_size": 72},
    "phi3": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": {},
    "codegen": {"num_attention_heads": 8, "hidden_size": 96, "n_head": 8, "n_embd": 96, "rotary_dim": 8},
    "opt": {},
    "bloom": {},
    "falcon": {"alibi": False},
    "falcon (new architecture)": {"new_decoder_architecture": True, "num_kv_heads": 3, "alibi": False},
    "falcon (MHA)": {"multi_query": False, "alibi": False},
    "mpt": {},
    "starcoder2": {},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "cohere": {},
    "cohere2": {},
    "granite": {},
    "smollm3": {},
    "helium": {"head_dim": 10},
    "nemotron": {},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "exaone4": {},
    "persimmon": {"hidden_size": 72},
    "biogpt": {},
    "xglm": {},
    "seed_oss": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "gpt_bigcode": {},
    "gpt_bigcode (MHA)": {"multi_query": False},
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "granitemoe": {},
    "gpt_oss": {},
    "deepseek_v2": {"num_key_value_heads": 6, "head_dim": 8},
    "deepseek_v3": {"num_key_value_heads": 6, "head_dim": 8},
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bitnet": {},
    "ctrl": {},
    "cwm": {},
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 96},
    "doge": {},
    "dots1": {"num_key_value_heads": 6, "moe_layer_freq": 1, "n_shared_experts": 1},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "granitemoeshared": {"shared_intermediate_size": 44},
    "granite_swa": {},
    "helium (tied)": {"head_dim": 10, "tie_word_embeddings": True},
    "hunyuan_v1_moe": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jetmoe": {"kv_channels": 14, "num_key_value_heads": 3},
    "lfm2": {},
    "llama4_text": {},
    "mellum": {},
    "minimax_m2": {},
    "minicpm3": {"num_key_value_heads": 6, "head_dim": 8},
    "modernbert-decoder": {},
    "moshi": {},
    "nanochat": {},
    "openai-gpt": {},
    "phimoe": {},
    "solar_open": {},
    "vaultgemma": {},
    "youtu": {"num_key_value_heads": 6, "head_dim": 8},
    "jamba": {},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 15, "mamba_expand": 2},
    "falcon_h1": {},
    "nemotron_h": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 15, "expand": 2},
    "falcon_mamba": {},
    "recurrent_gemma": {},
    "rwkv": {},
    "xlstm": {},
    "dbrx": {},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 6},
    "trocr": {},
    "gpt-sw3": {},
}

# Chunked linear attention unrolls into graphs of many thousand nodes: minutes each.
SLOW: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "qwen3_5_text": {},
}

QUICK = ("llama", "gpt_neox", "phi3", "gpt2", "qwen2_moe", "jamba")


def build(name: str, attention: str = "sdpa") -> torch.nn.Module:
    """A random model in float64; `eager` attention where the family has nothing else."""
    kind = name.partition(" (")[0]
    cls = CONFIG_MAPPING[kind]
    known = cls()
    accepted = {k: v for k, v in SIZES.items() if _accepts(cls, known, k)}
    options = {**accepted, **{**FAMILIES, **SLOW}.get(name, {})}
    config = cls(**{k: v for k, v in options.items() if v is not None})
    transformers.set_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float64)
    except ValueError as error:
        if "scaled_dot_product" not in str(error):
            raise
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.2)
    return reloaded(model)


def reloaded(model: torch.nn.Module) -> torch.nn.Module:
    """Mixtures run their experts as one batched product: what can be traced."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    return model


def _accepts(cls: type, known: Any, key: str) -> bool:
    fixed = isinstance(getattr(cls, key, None), property) and getattr(cls, key).fset is None
    return not fixed and (hasattr(known, key) or key in getattr(cls, "attribute_map", {}))
