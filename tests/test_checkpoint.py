"""Saving and loading of pruned models: nothing is lost, nothing half-written is taken for a checkpoint."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from slimgraph import checkpoint, hf
from slimgraph.checkpoint import load, load_manifest, save
from slimgraph.dtypes import cast_to
from slimgraph.errors import CheckpointError, NumericsError
from slimgraph.manifest import Manifest
from slimgraph.weightfiles import weight_files

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


# ---- pruned by hand ----


class Knife:
    """Slices a model by hand and writes down what it did."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fields: dict[str, Any] = {
            "shapes": {},
            "added": {},
            "attributes": {},
            "buffers": {},
            "original_shapes": {},
            "plan": {"kept": {"group 0": [0, 2]}},
            "recipe": {"passes": [{"name": "by hand", "ratio": 0.25}]},
            "versions": {name: version(name) for name in ("slimgraph", "torch", "transformers")},
        }

    def keep(self, name: str, dim: int, indices: list[int]) -> None:
        """Take a slice of a parameter or buffer; a buffer's values are to be kept, too."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        old = getattr(module, leaf)
        new = old.detach().index_select(dim, torch.tensor(indices)).clone()
        self.fields["original_shapes"].setdefault(name, list(old.shape))
        if leaf in module._buffers:
            module._buffers[leaf] = new
            self.fields["buffers"][name] = {"shape": list(new.shape), "dtype": str(new.dtype).removeprefix("torch.")}
            return
        setattr(module, leaf, nn.Parameter(new))
        self.fields["shapes"][name] = list(new.shape)

    def bias(self, name: str, size: int) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        assert getattr(module, leaf) is None
        setattr(module, leaf, nn.Parameter(torch.randn(size, dtype=module.weight.dtype)))
        self.fields["added"][name] = [size]

    def set(self, path: str, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.model.get_submodule(path), name, value)
        self.fields["attributes"].setdefault(path, {}).update(values)

    def manifest(self, **fields: Any) -> Manifest:
        return Manifest(**{**self.fields, **fields})


def heads(kept: list[int], size: int) -> list[int]:
    return [head * size + i for head in kept for i in range(size)]


def llama_config(**fields: Any) -> LlamaConfig:
    small: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**small, **fields})


def pruned_llama(**fields: Any) -> tuple[Any, Manifest]:
    """Other heads and widths in each layer, two new biases, attributes set, one layer untouched."""
    torch.manual_seed(0)
    dtype = fields.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_config(llama_config(**fields), dtype=dtype).eval()
    knife = Knife(model)
    plan: dict[int, tuple[list[int], int]] = {0: ([0, 2, 3], 20), 2: ([1], 33)}
    for layer, (groups, width) in plan.items():
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        knife.keep(f"{attention}.q_proj.weight", 0, heads(groups, 8))
        knife.keep(f"{attention}.k_proj.weight", 0, heads(groups, 4))
        knife.keep(f"{attention}.v_proj.weight", 0, heads(groups, 4))
        knife.keep(f"{attention}.o_proj.weight", 1, heads(groups, 8))
        knife.set(f"{attention}.q_proj", out_features=8 * len(groups))
        knife.set(f"{attention}.k_proj", out_features=4 * len(groups))
        knife.set(f"{attention}.v_proj", out_features=4 * len(groups))
        knife.set(f"{attention}.o_proj", in_features=8 * len(groups))
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            knife.keep(f"{mlp}.{name}.weight", dim, list(range(width)))
            knife.set(f"{mlp}.{name}", **{"in_features" if dim else "out_features": width})
        knife.set(mlp, intermediate_size=width)
    knife.bias("model.layers.0.self_attn.o_proj.bias", 32)
    knife.bias("model.layers.2.mlp.down_proj.bias", 32)
    widths = {layer: {"intermediate_size": width} for layer, (_, width) in plan.items()}
    return model, knife.manifest(per_layer_config=widths)


def pruned_rotary() -> tuple[Any, Manifest]:
    """One rotary pair less in every head: the non-persistent table of frequencies keeps its own values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(head_dim=8)).eval()
    knife = Knife(model)
    kept = [0, 1, 3, 4, 5, 7]  # pairs are (i, i + 4)
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        for name, dim, count in (("q_proj", 0, 8), ("k_proj", 0, 4), ("v_proj", 0, 4), ("o_proj", 1, 8)):
            rows = [head * 8 + i for head in range(count) for i in kept]
            knife.keep(f"{attention}.{name}.weight", dim, rows)
            knife.set(f"{attention}.{name}", **{"in_features" if dim else "out_features": len(rows)})
        knife.set(attention, head_dim=6)
    knife.keep("model.rotary_emb.inv_freq", 0, [0, 1, 3])
    knife.keep("model.rotary_emb.original_inv_freq", 0, [0, 1, 3])
    return model, knife.manifest()


def pruned_residual() -> tuple[Any, Manifest]:
    """A narrower residual stream in a tied model; the manifest names the tied tensor once."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True)).eval()
    knife = Knife(model)
    kept = [i for i in range(32) if i % 4]
    for name, parameter in list(model.named_parameters()):
        if "o_proj" in name or "down_proj" in name:
            knife.keep(name, 0, kept)
        else:
            knife.keep(name, parameter.ndim - 1, kept)
    model.tie_weights()
    return model, knife.manifest()


def pruned_gpt2() -> tuple[Any, Manifest]:
    """Fused projections in layers that store their weights transposed, attributes that hold sizes, tied embeddings."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    knife = Knife(model)
    kept = heads([0, 3], 8)
    block = "transformer.h.1"
    fused = [third * 32 + i for third in range(3) for i in kept]
    knife.keep(f"{block}.attn.c_attn.weight", 1, fused)
    knife.keep(f"{block}.attn.c_attn.bias", 0, fused)
    knife.keep(f"{block}.attn.c_proj.weight", 0, kept)
    knife.set(f"{block}.attn", split_size=16, num_heads=2, embed_dim=16)
    knife.set(f"{block}.attn.c_attn", nf=48)
    knife.set(f"{block}.attn.c_proj", nx=16)
    knife.keep(f"{block}.mlp.c_fc.weight", 1, list(range(100)))
    knife.keep(f"{block}.mlp.c_fc.bias", 0, list(range(100)))
    knife.keep(f"{block}.mlp.c_proj.weight", 0, list(range(100)))
    knife.set(f"{block}.mlp.c_fc", nf=100)
    return model, knife.manifest()


def pruned_mixture() -> tuple[Any, Manifest]:
    """Stacked experts, which the model's usual checkpoints store one by one under other names."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads_: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(**small, **heads_, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    knife = Knife(model)
    experts = "model.layers.1.mlp.experts"
    knife.keep(f"{experts}.gate_up_proj", 1, [*range(32), *range(48, 80)])
    knife.keep(f"{experts}.down_proj", 2, list(range(32)))
    return model, knife.manifest()


MODELS: dict[str, Callable[[], tuple[Any, Manifest]]] = {
    "llama": pruned_llama,
    "tied": lambda: pruned_llama(tie_word_embeddings=True),
    "rotary": pruned_rotary,
    "residual": pruned_residual,
    "gpt2": pruned_gpt2,
    "mixture": pruned_mixture,
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def same(model: Any, other: Any) -> bool:
    return torch.equal(logits(model), logits(other))


def quiet_run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


# ---- round trip ----


@pytest.mark.parametrize("name", MODELS)
def test_loads_what_was_saved_to_the_last_bit(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    model, manifest = MODELS[name]()
    before = logits(model)
    assert save(model, tmp_path / "new" / "model", manifest) == tmp_path / "new" / "model"
    assert torch.equal(logits(model), before)
    loaded = load(tmp_path / "new" / "model")
    assert not loaded.training
    assert torch.equal(logits(loaded), before)
    assert load_manifest(tmp_path / "new" / "model") == manifest
    for path, values in manifest.attributes.items():
        for attribute, value in values.items():
            assert getattr(loaded.get_submodule(path), attribute) == value
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(each.message) for each in recwarn if issubclass(each.category, UserWarning)] == []


def test_a_new_process_needs_nothing_but_the_import(tmp_path: Path) -> None:
    code = f"""
import sys, torch
import slimgraph.hf
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.save(model(torch.tensor({IDS.tolist()})).logits.detach(), directory + "/logits")
"""
    expected = {}
    for name in ("llama", "rotary", "gpt2"):
        model, manifest = MODELS[name]()
        save(model, tmp_path / name, manifest)
        expected[name] = logits(model)
    done = quiet_run(code, *(tmp_path / name for name in expected))
    assert done.returncode == 0, done.stderr
    for name, values in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "logits", weights_only=True), values)
    said = [line for line in done.stderr.splitlines() if "Loading weights" not in line and line.strip()]
    assert said == []


def test_no_pickle_and_json_only(tmp_path: Path) -> None:
    model, manifest = pruned_llama()
    vocabulary = {"<unk>": 0, "a": 1}
    backend = pytest.importorskip("tokenizers").Tokenizer(
        pytest.importorskip("tokenizers").models.WordLevel(vocabulary, unk_token="<unk>")
    )
    save(model, tmp_path / "m", manifest, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    assert {name.rpartition(".")[2] for name in names} <= {"json", "safetensors", "jinja"}
    entry = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "slimgraph"
    assert entry["per_layer_config"] == {"0": {"intermediate_size": 20}, "2": {"intermediate_size": 33}}
    assert "per_layer_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert [file for file in tmp_path.iterdir() if file.name != "m"] == []


def test_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, manifest = pruned_llama()
    whole = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: whole(*a, **k, max_shard_size="20KB"))
    save(model, tmp_path / "m", manifest)
    assert len(weight_files(tmp_path / "m")) > 1
    assert same(load(tmp_path / "m"), model)
    weight_files(tmp_path / "m")[0].unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-.*is missing"):
        load(tmp_path / "m")


def test_ordinary_checkpoints_load(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(llama_config()).eval()
    model.save_pretrained(tmp_path / "m")
    assert load_manifest(tmp_path / "m") is None
    assert same(load(tmp_path / "m"), model)


def test_kept_buffers_are_not_computed_anew(tmp_path: Path) -> None:
    model, manifest = pruned_rotary()
    original = model.model.rotary_emb.inv_freq.clone()
    save(model, tmp_path / "m", manifest)
    for dtype in (torch.float32, torch.bfloat16):
        loaded: Any = load(tmp_path / "m", dtype=dtype)
        assert torch.equal(loaded.model.rotary_emb.inv_freq, original)
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        assert next(loaded.parameters()).dtype == dtype


def test_a_buffer_of_the_same_shape_keeps_its_values(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(llama_config()).eval()
    knife = Knife(model)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    knife.keep("model.rotary_emb.inv_freq", 0, [0, 1])
    save(model, tmp_path / "m", knife.manifest())
    assert same(load(tmp_path / "m"), model)


def test_stored_under_the_names_of_the_model(tmp_path: Path) -> None:
    model, manifest = pruned_mixture()
    save(model, tmp_path / "m", manifest)
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == set(model.state_dict())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    for name in ("tied", "residual", "gpt2"):
        model, manifest = MODELS[name]()
        save(model, tmp_path / name, manifest)
        loaded: Any = load(tmp_path / name)
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_bfloat16_and_auto(tmp_path: Path) -> None:
    model, manifest = pruned_llama(dtype=torch.bfloat16)
    save(model, tmp_path / "m", manifest)
    for loaded in (load(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")):
        assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}
        assert same(loaded, model)
    assert {each.dtype for each in load(tmp_path / "m", dtype="float32").parameters()} == {torch.float32}


def test_options_of_from_pretrained(tmp_path: Path) -> None:
    model, manifest = pruned_llama()
    save(model, tmp_path / "m", manifest)
    for options in (
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"ignore_mismatched_sizes": True},
        {"attn_implementation": "eager"},
        {"config": AutoConfig.from_pretrained(tmp_path / "m")},
        {"config": AutoModelForCausalLM.from_pretrained(tmp_path / "m").config},
    ):
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True, **options)
        assert not any(report.values()), (options, report)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_generates_with_cache_as_without(name: str, tmp_path: Path) -> None:
    model, manifest = MODELS[name]()
    save(model, tmp_path / "m", manifest)
    loaded: Any = load(tmp_path / "m")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = loaded.generate(IDS, **options, use_cache=False)
    assert torch.equal(loaded.generate(IDS, **options), wanted)
    assert torch.equal(loaded.generate(IDS, **options, cache_implementation="static", disable_compile=True), wanted)


# ---- life after loading ----


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "rotary"])
def test_adapters_train_merge_and_save_again(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, manifest = MODELS[name]()
    save(model, tmp_path / "m", manifest)
    loaded: Any = load(tmp_path / "m")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    loaded.gradient_checkpointing_enable({"use_reentrant": True})
    adapted = peft.get_peft_model(loaded, config)
    adapted.train()
    adapted(IDS, labels=IDS).loss.backward()
    trained = [each for each in adapted.parameters() if each.requires_grad]
    assert trained
    assert all(each.grad is not None and each.grad.isfinite().all() for each in trained)
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    base: Any = load(tmp_path / "m")
    assert same(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), adapted)

    merged = adapted.merge_and_unload()
    assert not same(merged, model)
    merged.save_pretrained(tmp_path / "merged")
    assert same(load(tmp_path / "merged"), merged)
    assert load_manifest(tmp_path / "merged") == manifest
    save(merged, tmp_path / "again", manifest)
    assert same(load(tmp_path / "again"), merged)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_saves_itself_once_it_is_attached(name: str, tmp_path: Path) -> None:
    model, manifest = MODELS[name]()
    hf.attach(model, manifest)
    model.save_pretrained(tmp_path / "m")
    loaded: Any = load(tmp_path / "m")
    assert same(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert same(load(tmp_path / "again"), model)
    assert same(copy.deepcopy(loaded), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_saved_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model, manifest = pruned_rotary()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    save(model, tmp_path / "m", manifest, dtype=dtype)
    assert all(p is before[name][0] and p.equal(before[name][1]) for name, p in model.named_parameters())
    assert model.dtype == torch.float32
    assert model.config.dtype in (None, "float32", torch.float32)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded: Any = load(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(before[name][1].to(dtype))
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == torch.float32  # angles have no use for fewer digits
        assert buffer.equal(model.get_buffer(name))


def test_a_weight_that_a_dtype_cannot_hold(tmp_path: Path) -> None:
    model, manifest = pruned_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    before = model.model.norm.weight.clone()
    message = r"^the weight model\.norm\.weight holds 1e\+05, which is more than float16 can hold \(6\.55e\+04\); save "
    with pytest.raises(NumericsError, match=message):
        save(model, tmp_path / "m", manifest, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    assert model.model.norm.weight.equal(before)
    save(model, tmp_path / "m", manifest, dtype=torch.bfloat16)
    endless = torch.tensor([1.0, math.inf])  # is no smaller in float32
    assert cast_to("weight", endless, torch.float16).tolist() == [1.0, math.inf]


def test_all_weights_can_be_trained_by_the_trainer(tmp_path: Path) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    model, manifest = pruned_llama()
    save(model, tmp_path / "m", manifest)
    for each in (model, load(tmp_path / "m")):
        validate_quantization_for_training(each)
        assert each.hf_quantizer.is_serializable()
        assert each.hf_quantizer.is_trainable


def test_pruned_twice(tmp_path: Path) -> None:
    model, first = pruned_llama()
    save(model, tmp_path / "once", first)
    loaded: Any = load(tmp_path / "once")
    knife = Knife(loaded)
    for layer, width in ((0, 11), (1, 30)):
        mlp = f"model.layers.{layer}.mlp"
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            knife.keep(f"{mlp}.{name}.weight", dim, list(range(width)))
        knife.set(mlp, intermediate_size=width)
    knife.bias("model.layers.1.mlp.down_proj.bias", 32)
    second = knife.manifest(plan={"second": True}, per_layer_config={0: {"intermediate_size": 11}})
    expected = r"from \[20, 32\] to \[11, 32\], LlamaForCausalLM as built .* has \[48, 32\]; .*Manifest.after"
    unsaved(loaded, tmp_path / "twice", second, expected)
    both = second.after(first)
    save(loaded, tmp_path / "twice", both)
    assert same(load(tmp_path / "twice"), loaded)
    assert both.plan == {"second": True}
    assert both.per_layer_config == {0: {"intermediate_size": 11}, 2: {"intermediate_size": 33}}
    assert set(both.added) == set(first.added) | {"model.layers.1.mlp.down_proj.bias"}
    with pytest.raises(CheckpointError, match="order in which the model was pruned"):
        first.after(second)


def test_an_added_bias_and_a_kept_buffer_can_be_cut_again(tmp_path: Path) -> None:
    model, first = pruned_rotary()
    knife = Knife(model)
    knife.bias("model.layers.0.self_attn.v_proj.bias", 24)
    first = replace(first, added=knife.manifest().added)
    save(model, tmp_path / "once", first)
    loaded: Any = load(tmp_path / "once")
    knife = Knife(loaded)
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        for name, dim, count in (("q_proj", 0, 8), ("k_proj", 0, 4), ("v_proj", 0, 4), ("o_proj", 1, 8)):
            knife.keep(f"{attention}.{name}.weight", dim, [head * 6 + i for head in range(count) for i in (0, 1, 3, 4)])
        knife.set(attention, head_dim=4)
    knife.keep("model.layers.0.self_attn.v_proj.bias", 0, [head * 6 + i for head in range(4) for i in (0, 1, 3, 4)])
    knife.keep("model.rotary_emb.inv_freq", 0, [0, 1])
    knife.keep("model.rotary_emb.original_inv_freq", 0, [0, 1])
    # To whoever prunes the loaded model the table is a buffer like any other: both ways of naming it mean the same.
    buffers = knife.fields["buffers"]
    as_shapes = {name: spec["shape"] for name, spec in buffers.items()}
    for second in (knife.manifest(), knife.manifest(buffers={}, shapes={**knife.fields["shapes"], **as_shapes})):
        save(loaded, tmp_path / "twice", second.after(first), force=True)
        assert same(load(tmp_path / "twice"), loaded)


def test_registering_again_changes_nothing() -> None:
    hf.register()
    hf.register()


def test_an_ordinary_model_is_not_pruned_on_the_fly(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(tmp_path / "m")
    config = hf.SlimgraphConfig(**pruned_llama()[1].to_dict())
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config)


# ---- refused before anything is written ----


def unsaved(model: Any, place: Path, manifest: Manifest, match: str, **options: Any) -> None:
    before = sorted(place.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=match):
        save(model, place, manifest, **options)
    assert sorted(place.parent.rglob("*")) == before


def test_a_full_directory_is_not_touched(tmp_path: Path) -> None:
    model, manifest = pruned_llama()
    place = tmp_path / "m"
    place.mkdir()
    (place / "thesis.txt").write_text("precious")
    unsaved(model, place, manifest, "not empty")
    unsaved(model, place, manifest, "only a checkpoint is ever replaced", force=True)
    unsaved(model, place / "thesis.txt", manifest, "is a file")
    assert (place / "thesis.txt").read_text() == "precious"


def test_a_folder_beside_a_checkpoint_is_not_deleted_with_it(tmp_path: Path) -> None:
    model, manifest = pruned_llama()
    place = tmp_path / "m"
    save(model, place, manifest)
    (place / "additional_chat_templates").mkdir()  # a tokenizer's
    save(model, place, manifest, force=True)
    (place / "thesis").mkdir()
    unsaved(model, place, manifest, "holds the folder 'thesis' beside a checkpoint, nothing was written", force=True)


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    model, manifest = pruned_llama()
    (tmp_path / "m").mkdir()
    save(model, tmp_path / "m", manifest)
    assert same(load(tmp_path / "m"), model)


def test_force_replaces_a_checkpoint_even_through_a_link(tmp_path: Path) -> None:
    old, old_manifest = pruned_gpt2()
    new, manifest = pruned_llama()
    save(old, tmp_path / "m", old_manifest)
    (tmp_path / "link").symlink_to(tmp_path / "m", target_is_directory=True)
    save(new, tmp_path / "link", manifest, force=True)
    assert (tmp_path / "link").is_symlink()
    assert same(load(tmp_path / "m"), new)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "m"]


def test_what_is_no_plain_model_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, manifest = pruned_llama()
    unsaved(nn.Linear(2, 2), tmp_path / "m", manifest, "expected a transformers model")
    unsaved(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig()), tmp_path / "m", manifest, "merge adapters")
    adapted = copy.deepcopy(model)
    adapted.add_adapter(peft.LoraConfig())
    unsaved(adapted, tmp_path / "m", manifest, "has adapters attached")
    unsaved(copy.deepcopy(model).to("meta"), tmp_path / "m", manifest, "on the meta device")
    model.config.quantization_config = type("Other", (), {"quant_method": "gguf"})()
    unsaved(model, tmp_path / "m", manifest, "gguf")


def test_a_manifest_that_does_not_describe_the_model_is_refused(tmp_path: Path) -> None:
    model, manifest = pruned_llama()
    place = tmp_path / "m"
    name = "model.layers.0.mlp.up_proj.weight"

    def without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
        return {each: value for each, value in mapping.items() if each != key}

    less = replace(
        manifest, shapes=without(manifest.shapes, name), original_shapes=without(manifest.original_shapes, name)
    )
    unsaved(model, place, less, rf"'{name}' has shape \[20, 32\] in the model, the manifest leads to \[48, 32\]")
    less = replace(manifest, added={})
    unsaved(model, place, less, "'model.layers.0.self_attn.o_proj.bias'")
    wrong = replace(manifest, original_shapes={**manifest.original_shapes, name: [50, 32]})
    unsaved(model, place, wrong, r"from \[50, 32\] to \[20, 32\], LlamaForCausalLM as built .* has \[48, 32\]")
    wrong = replace(manifest, attributes={"model.layers.0.mlp": {"intermediate_size": 21}})
    unsaved(model, place, wrong, "'intermediate_size' of 'model.layers.0.mlp' is 20, not 21")
    wrong = replace(manifest, attributes={"model.layers.0.mlp": {"width": 20}})
    unsaved(model, place, wrong, "'width' .* no such attribute")
    wrong = replace(manifest, attributes={"model.layers.0.mlp": {"up_proj": 20}})
    unsaved(model, place, wrong, "'up_proj' .* a Linear")
    wrong = replace(manifest, attributes={"model.layers.7": {"width": 20}})
    unsaved(model, place, wrong, "the module 'model.layers.7'")
    wrong = replace(manifest, added={**manifest.added, "model.norm.bias": [32]})
    unsaved(model, place, wrong, "adds the parameter 'model.norm.bias'")
    wrong = replace(manifest, buffers={"model.norm.weight": {"shape": [32], "dtype": "float32"}})
    unsaved(model, place, wrong, "keeps the buffer 'model.norm.weight'")
    wrong = replace(manifest, buffers={"model.rotary_emb.inv_freq": {"shape": [2], "dtype": "float64"}})
    unsaved(model, place, wrong, "'model.rotary_emb.inv_freq' is torch.float32, not float64")
    rotary, manifest = pruned_rotary()
    less = replace(
        manifest,
        buffers=without(manifest.buffers, "model.rotary_emb.inv_freq"),
        original_shapes=without(manifest.original_shapes, "model.rotary_emb.inv_freq"),
    )
    unsaved(rotary, place, less, "'model.rotary_emb.inv_freq'")


# ---- stopped on the way ----

STEPS = ["save_pretrained", "tokenizer", "check", "aside", "into place"]


def break_at(step: str, monkeypatch: pytest.MonkeyPatch, model: Any, act: Callable[[], None]) -> dict[str, Any]:
    """Have `act` called in the middle of a step of saving. Returns further options for `save`."""
    rename = Path.rename
    seen: list[Path] = []

    def renaming(self: Path, target: Path) -> Path:
        seen.append(self)
        if len(seen) == (1 if step == "aside" else 2):
            act()
        return rename(self, target)

    whole = type(model).save_pretrained

    def saving(self: Any, directory: Path, **options: Any) -> None:
        whole(self, directory, **options)
        (directory / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:1000])
        act()

    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("{")
            if step == "tokenizer":
                act()

    def checking(*_: Any) -> None:
        act()

    if step == "save_pretrained":
        monkeypatch.setattr(type(model), "save_pretrained", saving)
    elif step == "check":
        monkeypatch.setattr(checkpoint, "check_stored", checking)
    elif step in ("aside", "into place"):
        monkeypatch.setattr(Path, "rename", renaming)
    return {"tokenizer": Tokenizer()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_leaves_everything_as_it_was(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, old_manifest = pruned_gpt2()
    save(old, tmp_path / "m", old_manifest)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    model, manifest = pruned_llama()

    def fail() -> None:
        raise error

    with monkeypatch.context() as patch:
        options = break_at(step, patch, model, fail)
        expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
            save(model, tmp_path / "m", manifest, force=True, **options)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["m"]
    save(model, tmp_path / "m", manifest, force=True)
    assert same(load(tmp_path / "m"), model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("step", STEPS)
def test_a_killed_run_leaves_no_half_checkpoint(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, old_manifest = pruned_gpt2()
    save(old, tmp_path / "m", old_manifest)
    model, manifest = pruned_llama()
    with monkeypatch.context() as patch:
        options = break_at(step, patch, model, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:  # the run that is killed; nothing of it may return into pytest
            try:
                save(model, tmp_path / "m", manifest, force=True, **options)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = [each for each in tmp_path.iterdir() if each.name != "m"]
    assert left
    for each in left:
        assert each.name.startswith(".m.slimgraph-")
        with pytest.raises(CheckpointError, match="left behind"):
            load(each)
    if step == "into place":  # between two renames: nothing is lost, and the message says where it is
        with pytest.raises(CheckpointError, match=r"the old one is .*\.m\.slimgraph-replaced-"):
            load(tmp_path / "m")
        next(each for each in left if "replaced" in each.name).rename(tmp_path / "m")
    assert same(load(tmp_path / "m"), old)
    save(model, tmp_path / "m", manifest, force=True)
    assert same(load(tmp_path / "m"), model)


# ---- damaged ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, manifest = pruned_llama()
    return save(model, tmp_path_factory.mktemp("whole") / "m", manifest)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory: Path, *parts: str, plain: bool = True) -> None:
    """`load` refuses in one line that has all parts; so does `from_pretrained`, where it is said to."""
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    if plain:
        with pytest.raises(CheckpointError):
            AutoModelForCausalLM.from_pretrained(directory, ignore_mismatched_sizes=True)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such directory", "config.json", plain=False)
    refused(tmp_path, "no config.json in it", plain=False)


def test_missing_files(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    refused(damaged, str(damaged), "neither model.safetensors nor model.safetensors.index.json", plain=False)
    (damaged / "pytorch_model.bin").write_bytes(b"never read")
    refused(damaged, "neither model.safetensors", plain=False)
    (damaged / "config.json").unlink()
    refused(damaged, "no config.json in it", plain=False)


def test_damaged_config(damaged: Path) -> None:
    (damaged / "config.json").write_text('{"model_type": "llama", ')
    refused(damaged, "config.json cannot be read", plain=False)
    (damaged / "config.json").write_text('{"model_type": "no such thing"}')
    refused(damaged, "cannot be loaded", "no such thing", plain=False)


@pytest.mark.parametrize("size", [4, 100, -10])
def test_truncated_weights(damaged: Path, size: int) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(damaged, str(file), "damaged or incomplete")


def test_damaged_index(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    (damaged / "model.safetensors.index.json").write_text("[]")
    refused(damaged, "model.safetensors.index.json cannot be read", plain=False)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.bias", "model.layers.2.mlp.up_proj.weight"])
def test_a_tensor_of_the_manifest_is_missing(damaged: Path, name: str) -> None:
    edit_weights(damaged, lambda weights: weights.pop(name))
    refused(damaged, str(damaged / "model.safetensors"), repr(name), "missing")


def test_another_tensor_is_missing(damaged: Path) -> None:
    edit_weights(damaged, lambda weights: weights.pop("model.norm.weight"))
    refused(damaged, str(damaged), "'model.norm.weight' is missing", plain=False)


def test_a_tensor_has_another_shape(damaged: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(damaged, lambda weights: weights.update({name: torch.zeros(48, 32)}))
    refused(damaged, str(damaged / "model.safetensors"), repr(name), "[48, 32]", "[20, 32]")


def test_a_tensor_outside_the_manifest_has_another_shape(damaged: Path) -> None:
    edit_weights(damaged, lambda weights: weights.update({"model.norm.weight": torch.zeros(31)}))
    refused(damaged, "'model.norm.weight'", "[31]", "[32]", plain=False)


def test_a_tensor_too_many(damaged: Path) -> None:
    edit_weights(damaged, lambda weights: weights.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(20)}))
    refused(damaged, "'model.layers.0.mlp.up_proj.bias'", "without it", plain=False)


def test_config_of_another_model(damaged: Path) -> None:
    edit_config(damaged, lambda config: config.update(intermediate_size=56))
    refused(damaged, "config.json", str(damaged), "'model.layers.0.mlp.down_proj.weight' from [32, 48]", "has [32, 56]")


def test_an_interrupted_copy_of_the_manifest(damaged: Path) -> None:
    edit_config(damaged, lambda config: config["quantization_config"].pop("added"))
    refused(damaged, "config.json", "'added' is missing")


def test_foreign_code_is_not_run(damaged: Path) -> None:
    edit_config(damaged, lambda config: config.update(model_type="mine", auto_map={"AutoConfig": "evil.Config"}))
    (damaged / "evil.py").write_text("raise SystemExit('run')")
    refused(damaged, "trust_remote_code", plain=False)


# ---- manifest ----


def test_manifest_survives_json() -> None:
    _, manifest = pruned_llama()
    data = manifest.to_dict()
    assert Manifest.from_dict(json.loads(json.dumps(data))) == manifest
    data["shapes"].clear()
    assert manifest.shapes
    del data["per_layer_config"]
    assert Manifest.from_dict({**manifest.to_dict(), "per_layer_config": {}}).per_layer_config == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": {"a": [1, -1]}}, "shapes -> a -> 1: found -1"),
        ({"shapes": {"a": (1, 2)}}, r"shapes -> a: found \(1, 2\)"),
        ({"shapes": {"a": [2]}}, "'a' the shape .2. and the original shape None"),
        ({"shapes": {"a": [2]}, "original_shapes": {"a": [2, 3]}}, "as many dimensions"),
        ({"original_shapes": {"a": [2]}}, "neither in 'shapes' nor in 'buffers'"),
        ({"added": [1]}, "added: found"),
        ({"attributes": {"a": {"b": {}}}}, "attributes -> a -> b"),
        ({"attributes": {"a": {"b": math.inf}}}, "attributes: found NaN or infinity"),
        ({"plan": {"a": (1, 2)}}, "plan -> a"),
        ({"plan": {1: 2}}, "plan -> 1"),
        ({"recipe": {"a": math.nan}}, "recipe: found NaN"),
        ({"versions": {"torch": 2}}, "versions -> torch: found 2"),
        ({"per_layer_config": {"one": {}}}, "per_layer_config -> one"),
        ({"buffers": {"b": {"shape": [1]}}}, "buffers -> b: found"),
        ({"buffers": {"b": {"shape": [1], "dtype": "float"}}}, None),
        ({"buffers": {"b": {"shape": [1], "dtype": "nn"}}}, "buffers -> b -> dtype: found 'nn'"),
        ({"buffers": {"b": {"shape": [1], "dtype": "int8"}}, "added": {"b": [1]}}, "both 'added' and 'buffers'"),
    ],
)
def test_manifest_refuses_what_it_cannot_hold(change: dict[str, Any], message: str | None) -> None:
    empty: dict[str, Any] = {
        name: {}
        for name in ("shapes", "added", "attributes", "buffers", "original_shapes", "plan", "recipe", "versions")
    }
    if message is None:
        Manifest(**{**empty, **change})
        return
    with pytest.raises(CheckpointError, match=message):
        Manifest(**{**empty, **change})
    with pytest.raises(CheckpointError, match=r"^here: "):
        Manifest.from_dict({**empty, **change}, source="here")


def test_manifest_of_another_version() -> None:
    with pytest.raises(CheckpointError, match="unknown manifest field 'sparsity'"):
        Manifest.from_dict({"sparsity": {}})
    with pytest.raises(CheckpointError, match="'added' is missing"):
        Manifest.from_dict({"shapes": {}})
