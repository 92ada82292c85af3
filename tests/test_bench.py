from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import FeedForward, Toy
from torch import nn
from transformers import LlamaForCausalLM

from slimgraph import bench as module
from slimgraph import cli
from slimgraph.bench import Rate, Settings, bench
from slimgraph.cost import Cost, cost
from slimgraph.errors import CalibrationError, EvaluationError, ModelError
from slimgraph.peak import peak_growth

QUICK = Settings(prompt_tokens=8, new_tokens=3, batch=2, repetitions=2)
COST = Cost(parameters=1, weight_bytes=1, macs_per_token=1, tokens=1, cache_bytes_per_token=1, cache_bytes_fixed=0)


def test_a_rate_is_the_median_with_half_the_distance_of_the_quartiles() -> None:
    rate = Rate.of(60, [1.0, 2.0, 3.0, 4.0, 6.0])
    assert rate.values == (60, 30, 20, 15, 10)
    assert (rate.median, rate.spread) == (20, (30 - 15) / 2)
    assert Rate.of(6, [2.0]) == Rate(3.0, 0.0, (3.0,))


def test_models_are_measured_side_by_side(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    models = {"whole": tiny_llama(), "half": tiny_llama(intermediate_size=24)}
    found = bench(models, QUICK, costs={"half": COST})
    assert [m.name for m in found.measurements] == ["whole", "half"]
    assert [m.cost for m in found.measurements] == [cost(models["whole"], tokens=8), COST]
    for measured in found.measurements:
        for rate in (measured.prefill, measured.decode):
            assert len(rate.values) == 2
            assert min(rate.values) > 0
        assert measured.peak_bytes is None or measured.peak_bytes >= measured.cost.weight_bytes
    rows = found.to_markdown().splitlines()
    assert rows[2].startswith("| whole |")
    assert "1.00x" in rows[2]
    assert all(name in repr(found) for name in ("decode tok/s", "whole", "half", "2 x 8 prompt tokens"))
    assert json.loads(json.dumps(found.to_dict()))["measurements"][1]["cost"]["parameters"] > 0


def test_every_token_is_read_once_and_every_new_one_goes_through_alone(
    tiny_llama: Callable[..., LlamaForCausalLM],
) -> None:
    model, seen = tiny_llama(), []

    def note(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
        cache = options["past_key_values"]
        seen.append((tuple(options["input_ids"].shape), 0 if cache is None else cache.get_seq_length()))

    model.register_forward_pre_hook(note, with_kwargs=True)
    bench({"it": model}, Settings(8, 3, 2, repetitions=1, warmup=0), costs={"it": COST})
    once = [((2, 8), 0), ((2, 1), 8), ((2, 1), 9), ((2, 1), 10)]
    assert seen == 2 * once  # for the memory, and for the time


def test_repetitions_take_turns(tiny_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    run = module._Runner.run
    monkeypatch.setattr(module._Runner, "run", lambda self: (order.append(self.name), run(self))[1])
    models = {"a": tiny_llama(), "b": tiny_llama()}
    bench(models, Settings(4, 1, 1, repetitions=3, warmup=0), costs=dict.fromkeys("ab", COST))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


class Small(nn.Module):
    """A model for which memory runs out above a number of sequences."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model = model
        self.most = most

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.model(input_ids=input_ids, **options)


def test_when_memory_runs_out_the_batch_is_halved_for_all(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    models = {"large": tiny_llama(), "small": Small(tiny_llama(), most=3)}
    found = bench(models, Settings(4, 1, batch=8, repetitions=1), costs=dict.fromkeys(models, COST))
    assert found.settings.batch == 2
    with pytest.raises(EvaluationError, match="memory ran out"):
        bench({"small": Small(tiny_llama(), most=0)}, QUICK, costs={"small": COST})


def test_what_cannot_be_measured_is_refused(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(ModelError, match="at least one"):
        bench({})
    with pytest.raises(ModelError, match="new_tokens is 0"):
        Settings(new_tokens=0)
    with pytest.raises(CalibrationError, match="64 positions"):
        bench({"it": tiny_llama()}, Settings(prompt_tokens=60, new_tokens=5), costs={"it": COST})
    with pytest.raises(ModelError, match="key-value cache"):
        bench({"toy": Toy(FeedForward())}, QUICK, costs={"toy": COST})


def test_peak_growth_is_what_the_work_takes() -> None:
    size = 64 * 2**20
    before = torch.ones(size // 4)
    del before  # freed memory that is taken again counts again
    found = peak_growth(lambda: torch.ones(size // 4).sum(), torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not say")
    assert 0.9 * size < found < 2 * size
    assert peak_growth(lambda: None, torch.device("cpu")) in range(size // 4)


# ---- the command ----


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., LlamaForCausalLM]) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    return directory


def test_the_command_writes_what_it_shows(
    model_dir: Path, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], capsys: pytest.CaptureFixture[str]
) -> None:
    other, table = tmp_path / "other", tmp_path / "table.md"
    tiny_llama(intermediate_size=16).save_pretrained(other)
    sizes = ["--prompt-tokens", "6", "--new-tokens", "2", "--repetitions", "2"]
    code = cli._run(["bench", str(model_dir), str(other), *sizes, "--json", "-", "--markdown", str(table)])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    dense, pruned = found["measurements"]
    assert dense["checkpoint_bytes"] == (model_dir / "model.safetensors").stat().st_size
    assert pruned["cost"]["parameters"] < dense["cost"]["parameters"]
    assert math.isclose(dense["decode"]["median"], sum(dense["decode"]["values"]) / 2)
    assert table.read_text().count("\n| ") == 3 - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dir}", "{dir}"], "given 2 times"),
        (["{dir}", "--prompt-tokens", "100"], "64 positions"),
        (["{dir}", "--device", "cuda:99"], "--device"),
        (["{dir}", "--json", "/nowhere/x.json"], "--json"),
    ],
)
def test_bad_input_is_one_line(
    model_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli._run(["bench", *(a.replace("{dir}", str(model_dir)) for a in arguments)])
    error = capsys.readouterr().err.strip()
    assert code == 1
    assert message in error
    assert "\n" not in error
