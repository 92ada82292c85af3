from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from slimgraph import cli, plots
from slimgraph import compare as module
from slimgraph.bench import Settings
from slimgraph.compare import Comparison, Contender, Measures, compare, pruned_at
from slimgraph.errors import CalibrationError, CheckpointError, EvaluationError, ModelError, PlanError
from slimgraph.perplexity import perplexity
from slimgraph.text import read_tokens


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text("the old cat sits under a tree and the dog runs . a new house is under the tree .\n" * 20)
    return file


@pytest.fixture(scope="module")
def whole(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def found(whole: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, text: Path) -> Comparison:
    """A model and itself pruned, with everything that can be measured."""
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    contenders = [
        Contender("whole", lambda: whole, tiny_tokenizer),
        *pruned_at("whole", whole, [0.2], ids, tokenizer=tiny_tokenizer, method="random", round_to=1),
    ]
    measures = Measures(
        texts=[text],
        seq_len=16,
        tasks=lambda model, tokenizer: {"size": float(sum(p.numel() for p in model.parameters()))},
        speed=Settings(prompt_tokens=8, new_tokens=2, repetitions=2),
    )
    return compare(contenders, measures)


def test_every_number_is_the_models_own(
    found: Comparison, whole: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, text: Path
) -> None:
    first = found.entries[0]
    expected = perplexity(whole, read_tokens(text, tiny_tokenizer), seq_len=16)
    assert replace(first.perplexities["story"], seconds=0.0) == replace(expected, seconds=0.0)
    assert first.cost.parameters == sum(p.numel() for p in whole.parameters())
    assert first.cost.tokens == 8
    assert first.tasks == {"size": first.cost.parameters}
    assert first.speed is not None
    assert first.speed.cost == first.cost


def test_ratios_that_are_no_whole_percents_have_names_of_their_own(whole: LlamaForCausalLM) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    names = [c.name for c in pruned_at("a", whole, [0.125, 0.2, 0.204, 0.29], ids)]
    assert names == ["a -12.5%", "a -20%", "a -20.4%", "a -29%"]


def test_the_dense_model_is_pruned_at_every_ratio(found: Comparison, whole: LlamaForCausalLM) -> None:
    assert [e.name for e in found.entries] == ["whole", "whole -20%"]
    assert [round(found.share(e), 1) for e in found.entries] == [1.0, 0.8]
    assert all(e.cost.parameters == e.tasks["size"] for e in found.entries)
    assert {e.series for e in found.entries} == {"whole"}
    assert found.entries[0].cost.parameters == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("bos", ["never", "always"])
def test_windows_begin_as_asked(
    whole: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, text: Path, bos: str
) -> None:
    starting = copy.deepcopy(tiny_tokenizer)
    starting.add_special_tokens({"bos_token": "the"})
    (entry,) = compare([Contender("whole", lambda: whole, starting)], Measures([text], seq_len=16, bos=bos)).entries
    start = [starting.bos_token_id] if bos == "always" else []
    expected = perplexity(whole, read_tokens(text, starting), seq_len=16, start=start)
    assert entry.perplexities["story"].value == expected.value


def test_what_is_known_is_not_measured(
    whole: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = perplexity(whole, read_tokens(text, tiny_tokenizer), seq_len=16)
    monkeypatch.setattr("slimgraph.compare.perplexity", None)
    one = Contender("a", lambda: whole, tiny_tokenizer, perplexities={str(text): known}, tasks={"size": 1.0})
    (entry,) = compare([one], Measures([text], seq_len=16, tasks=lambda *_: {"size": 2.0})).entries
    assert entry.perplexities == {"story": known}
    assert entry.tasks == {"size": 1.0}
    (entry,) = compare([one], Measures(seq_len=16)).entries
    assert entry.perplexities == entry.tasks == {}


def test_all_forms_say_the_same(found: Comparison) -> None:
    rows = found.to_markdown().split("\n\n")[0].splitlines()
    assert len(rows) == 2 + 2
    value = found.entries[1].perplexities["story"].value
    for form in (repr(found), rows[3]):
        assert f"{value:.2f} ±" in form
        assert "whole -20%" in form
    data = json.loads(json.dumps(found.to_dict()))
    assert data["entries"][1]["perplexities"]["story"]["value"] == value


def test_pictures(found: Comparison, tmp_path: Path) -> None:
    png, svg = plots.plot(found, tmp_path / "a.png"), plots.plot(found, tmp_path / "a.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = ElementTree.parse(svg).getroot()
    assert drawn.tag.endswith("svg")
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "a.svg"}


def test_models_are_dropped_once_measured(
    tiny_llama: Callable[..., LlamaForCausalLM], found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[LlamaForCausalLM]] = []
    monkeypatch.setattr(module, "cost", lambda *_, **__: found.entries[0].cost)

    def load() -> LlamaForCausalLM:
        gc.collect()
        assert not any(each() for each in alive)
        model = tiny_llama(num_hidden_layers=1)
        alive.append(weakref.ref(model))
        return model

    shown = repr(compare([Contender("a", load), Contender("b", load)]))
    assert len(alive) == 2
    assert "MACs/token" in shown
    assert "ppl" not in shown  # nothing more was asked
    assert "decode" not in shown


def test_what_cannot_be_compared_is_refused(
    found: Comparison,
    whole: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    one = Contender("a", lambda: whole, tiny_tokenizer)
    with pytest.raises(ModelError, match="name of its own"):
        compare([one, one])
    with pytest.raises(CalibrationError):
        compare([one], Measures(texts=[tmp_path / "missing.txt"]))
    with pytest.raises(PlanError, match="out of range"):
        pruned_at("a", whole, [0.2, 1.5], torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(CheckpointError, match=r"\.png, \.svg"):
        plots.plot(found, tmp_path / "a.gif")
    with pytest.raises(CheckpointError, match="exists"):
        plots.plot(found, tmp_path / "nowhere" / "a.png")
    with pytest.raises(EvaluationError, match="nothing to draw"):
        plots.plot(Comparison(tuple(replace(e, perplexities={}, tasks={}, speed=None) for e in found.entries)), "a.png")


def test_a_ratio_that_cannot_be_reached_costs_its_own_row_only(whole: LlamaForCausalLM) -> None:
    pruned = pruned_at("a", whole, [0.9, 0.2], torch.zeros(1, 4, dtype=torch.long), method="random", round_to=1)
    found = compare([Contender("a", lambda: whole), *pruned])
    assert [e.name for e in found.entries] == ["a", "a -20%"]
    assert [note for note in found.notes if note.startswith("a -90% is left out: ratio 0.9 cannot be reached")]
    with pytest.raises(PlanError, match="cannot be reached"):
        compare(pruned)


def test_the_command(
    whole: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    model, table, picture = str(tmp_path / "model"), tmp_path / "table.md", tmp_path / "a.svg"
    sweeping = ["--ratios", "0.1", "--calibration", str(text), "--samples", "4", "--method", "random"]
    files = ["--json", "-", "--markdown", str(table), "--plot", str(picture)]
    assert cli._run(["compare", model, "--text", str(text), "--seq-len", "16", *sweeping, *files]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert [e["series"] for e in entries] == [model, model]
    assert entries[0]["checkpoint_bytes"] > entries[0]["cost"]["parameters"]
    assert "ppl story" in table.read_text()
    assert picture.exists()

    for arguments, message in [
        (["--ratios", "0.1,x"], "--ratios is '0.1,x'"),
        (["--plot", str(picture)], "nothing to draw"),
        ([model], "given 2 times"),
    ]:
        assert cli._run(["compare", model, *arguments]) == 1
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
