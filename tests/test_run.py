"""Run files: what they say, what is refused, and the whole way on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import slimgraph
from slimgraph import cli
from slimgraph.bench import Settings
from slimgraph.errors import CalibrationError, CheckpointError, DataError, RecipeError, SlimgraphError
from slimgraph.finetune import FinetuneSettings
from slimgraph.passes import Pearson, Sweep, UniformAllocation, WandaSp
from slimgraph.perplexity import perplexity
from slimgraph.pretrained import load_model
from slimgraph.run import CalibrationSection, RunFile, RunReport, _known, run

PASSES = [
    {"pearson": {}},
    {"feature_space": {}},
    {"regression": {}},
    {"uniform_allocation": {"ratio": 0.1, "round_to": 1}},
    {"sweep": {}},
]
EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("run_*.yaml"))


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the old cat sits under a tree and the dog runs .\n" * 60)
    return folder


def content_of(place: Path, out: Path) -> dict[str, Any]:
    return {
        "model": str(place / "model"),
        "out": str(out),
        "calibration": {"text": str(place / "text.txt"), "samples": 4, "seq_len": 16},
        "passes": PASSES,
        "evaluate": {"texts": [str(place / "text.txt")], "seq_len": 16, "tokens": 64, "dense": True},
    }


@pytest.fixture
def content(place: Path, tmp_path: Path) -> dict[str, Any]:
    return content_of(place, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[dict[str, Any], RunReport]:
    """A run that is done; tests may read it and go on with it."""
    data = content_of(place, place / "out")
    return data, run(RunFile.from_dict(data))


def test_prune_and_evaluate(finished: tuple[dict[str, Any], RunReport]) -> None:
    content, report = finished
    out = Path(content["out"])
    assert list(report.evaluations) == ["dense", "pruned"]
    assert report.evaluations["pruned"].parameters < report.evaluations["dense"].parameters
    assert report.pruned is not None
    assert sum(p.numel() for p in slimgraph.load(out / "pruned").parameters()) == report.pruned.parameters_after
    saved = json.loads((out / "evaluation.json").read_text())
    assert saved["pruned"]["parameters"] == report.evaluations["pruned"].parameters
    assert RunFile.from_file(out / "run.yaml") == RunFile.from_dict(content)
    assert "all of it in" in repr(report)


def test_a_run_goes_on_after_its_last_finished_step(finished: tuple[dict[str, Any], RunReport]) -> None:
    content, first = finished
    weights = Path(content["out"]) / "pruned" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run(RunFile.from_dict(content))
    assert (again.kept, again.pruned) == (["pruned"], None)
    assert weights.stat().st_mtime_ns == before
    value = {name: e.perplexities[content["evaluate"]["texts"][0]].value for name, e in first.evaluations.items()}
    assert again.evaluations["pruned"].perplexities[content["evaluate"]["texts"][0]].value == value["pruned"]


def test_another_run_in_the_same_folder_is_refused_unless_forced(
    finished: tuple[dict[str, Any], RunReport], tmp_path: Path
) -> None:
    content, _ = finished
    shutil.copytree(content["out"], tmp_path / "out")
    changed = {**content, "out": str(tmp_path / "out"), "calibration": {**content["calibration"], "seed": 1}}
    with pytest.raises(CheckpointError, match="holds something that is not this run"):
        run(RunFile.from_dict(changed))
    assert run(RunFile.from_dict(changed), force=True).kept == []
    assert run(RunFile.from_dict(changed)).kept == ["pruned"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        run(RunFile.from_dict({**changed, "out": str(tmp_path / "file")}))


def test_a_finished_run_can_measure_more(content: dict[str, Any]) -> None:
    first = run(RunFile.from_dict({**content, "evaluate": None}))
    assert first.evaluations == {}
    assert run(RunFile.from_dict(content)).kept == ["pruned"]
    noted = Path(content["out"]) / "run.yaml"
    assert RunFile.from_file(noted) == RunFile.from_dict(content)
    for text in ("nothing: of ours", "- a list", "{", noted.read_text().replace("    search: true\n", "")):
        noted.write_text(text)
        with pytest.raises(CheckpointError, match="holds something that is not this run"):
            run(RunFile.from_dict(content))


def test_no_measures_lie_beside_a_run_that_did_not_ask_for_them(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, texts = Path(content["out"]), content["evaluate"]["texts"]
    run(RunFile.from_dict({**content, "compare": {"texts": texts, "seq_len": 16}}))
    kept = (out / "evaluation.json").read_text()
    again = run(RunFile.from_dict({**content, "compare": None}))
    assert again.kept == ["pruned"]
    assert list(again.evaluations) == list(json.loads(kept))
    assert sorted(p.name for p in out.iterdir()) == ["evaluation.json", "pruned", "run.yaml"]
    with monkeypatch.context() as patched:
        patched.setattr("slimgraph.run._evaluate", lambda *_: None)
        run(RunFile.from_dict({**content, "compare": None}))
        assert (out / "evaluation.json").is_file()
        run(RunFile.from_dict({**content, "evaluate": {"texts": texts, "seq_len": 8}}))
        assert not (out / "evaluation.json").exists()
    run(RunFile.from_dict({**content, "evaluate": None, "calibration": {"samples": 2, "seq_len": 8}}), force=True)
    assert sorted(p.name for p in out.iterdir()) == ["pruned", "run.yaml"]


def test_what_is_none_is_no_other_run(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fields that are None are not noted down."""
    (tmp_path / "records.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 4))
    data = {**content, "finetune": {"data": str(tmp_path / "records.json"), "records": None}, "evaluate": None}
    monkeypatch.setattr("slimgraph.run._finetune", lambda *_: None)
    run(RunFile.from_dict({**data, "finetune": None}))  # it can be added
    assert run(RunFile.from_dict(data)).kept == ["pruned"]
    assert run(RunFile.from_dict(data)).kept == ["pruned"]
    for change in ({"finetune": None}, {"finetune": {**data["finetune"], "epochs": 3}}, {"dtype": "float64"}):
        with pytest.raises(CheckpointError, match="holds something that is not this run"):
            run(RunFile.from_dict({**data, **change}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"evaluate": {"texts": ["nowhere.txt"]}}, CalibrationError, r"nowhere\.txt"),
        ({"finetune": {"data": "nowhere.json"}}, DataError, r"nowhere\.json"),
        ({"passes": PASSES[:3] + PASSES[4:]}, RecipeError, "sweep: nothing before it says how many units stay"),
    ],
    ids=["a text", "records", "an allocation"],
)
def test_what_a_step_needs_is_looked_at_before_the_first(
    finished: tuple[dict[str, Any], RunReport],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[SlimgraphError],
    message: str,
) -> None:
    out = shutil.copytree(finished[0]["out"], tmp_path / "out")
    for where in (out, tmp_path / "new"):
        with pytest.raises(error, match=message):
            run(RunFile.from_dict({**finished[0], "out": str(where), **change}), force=True)
    assert (out / "pruned" / "config.json").is_file()
    assert not (tmp_path / "new").exists()


def test_where_pruning_fails_a_run_with_that_mended_begins(content: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="too short"):
        run(RunFile.from_dict({**content, "calibration": {**content["calibration"], "samples": 10**6}}))
    assert not any(Path(content["out"]).iterdir())
    assert run(RunFile.from_dict({**content, "evaluate": None})).pruned is not None


def test_a_run_does_not_take_anothers_model_for_its_own(
    finished: tuple[dict[str, Any], RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what another run made cannot be removed, this one is not noted down."""
    out = shutil.copytree(finished[0]["out"], tmp_path / "out")
    other = RunFile.from_dict({**finished[0], "out": str(out)})

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("slimgraph.run.shutil.rmtree", refuse)
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
            run(other, force=True)
    with pytest.raises(CheckpointError, match="holds something that is not this run"):
        run(other)


@pytest.mark.parametrize(("left", "resumes"), [((), False), (("partial-step-1",), False), (("step-00000001",), True)])
def test_fine_tuning_goes_on_from_a_checkpoint_that_was_finished(
    finished: tuple[dict[str, Any], RunReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: tuple[str, ...],
    resumes: bool,
) -> None:
    out = shutil.copytree(finished[0]["out"], tmp_path / "out")
    (out / "finetuned.checkpoints").mkdir()
    for name in left:
        (out / "finetuned.checkpoints" / name).mkdir()
    called: dict[str, Any] = {}
    monkeypatch.setattr("slimgraph.run.finetune", lambda *_, **options: called.update(options))
    monkeypatch.setattr("slimgraph.run.read_records", lambda *_, **__: [])
    plan = RunFile.from_dict({**finished[0], "out": str(out), "finetune": {"data": "x.json"}, "evaluate": None})
    (out / "run.yaml").write_text(plan.to_yaml())
    run(plan)
    assert (called["resume"], called["force"]) == (resumes, not resumes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model: .*string"),
        ({"calibration": {"samples": 0}}, "calibration.samples: .*greater than or equal to 1.*found 0"),
        ({"calibration": {"sample": 3}}, "calibration.sample: Extra inputs"),
        ({"evaluate": {"bos": "perhaps"}}, "evaluate.bos: .*'auto'"),
        ({"dtype": "int8"}, "dtype: .*'float32'"),
        ({"passes": [{"best": {}}]}, "no pass is called 'best'"),
        ({"passes": [{"pearson": {"search": 3.5}}]}, "pass 1 of the recipe, pearson: search"),
        ({"finetune": {"epochs": 1}}, "finetune.data: Field required"),
        ({"train": {}}, "train: Extra inputs"),
    ],
)
def test_a_run_file_that_is_wrong_names_the_place(
    content: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        RunFile.from_dict({**content, **change})


def test_changes_go_before_the_file(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    found = RunFile.from_file(file, ["calibration.samples=7", "evaluate.texts=[a, b]", "compare.speed=true"])
    assert found.calibration.samples == 7
    assert found.evaluate is not None
    assert found.evaluate.texts == ("a", "b")
    assert found.compare is not None
    assert found.compare.speed
    for wrong in ("samples", "model.name=3", "model=[1"):
        with pytest.raises(RecipeError, match=r"run.yaml: the change"):
            RunFile.from_file(file, [wrong])
    with pytest.raises(RecipeError, match="cannot read"):
        RunFile.from_file(tmp_path / "none.yaml")
    file.write_text("a: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        RunFile.from_file(file)
    file.write_text("- a")
    with pytest.raises(RecipeError, match="is a mapping"):
        RunFile.from_file(file)


def test_changes_reach_into_the_one_pass_of_a_name(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    passes = ["wanda_sp", {"uniform_allocation": {"ratio": 0.2}}, "sweep", {"uniform_allocation": {"ratio": 0.1}}]
    passes += [{"pearson": None}, "sweep"]
    file.write_text(yaml.safe_dump({**content, "passes": passes[:3]}))
    changes = ["passes.uniform_allocation.ratio=0.3", "passes.sweep.dtype=bfloat16"]
    assert RunFile.from_file(file, changes).passes.to_dict()["passes"] == [
        WandaSp().to_recipe(),
        UniformAllocation(ratio=0.3).to_recipe(),
        Sweep(dtype="bfloat16").to_recipe(),
    ]
    file.write_text(yaml.safe_dump({**content, "passes": passes}))
    assert RunFile.from_file(file, ["passes.pearson.search=false"]).passes.passes[4] == Pearson(search=False)
    for twice_or_never in ("uniform_allocation.ratio", "sweep.dtype", "cosine_allocation.ratio", "0.ratio"):
        with pytest.raises(RecipeError, match=r"expected KEY=VALUE, .*, or passes\.NAME\.KEY=VALUE"):
            RunFile.from_file(file, [f"passes.{twice_or_never}=0.3"])


def test_a_model_keeps_its_dtype(content: dict[str, Any], tmp_path: Path) -> None:
    narrow = shutil.copytree(content["model"], tmp_path / "narrow")
    load_model(narrow, dtype=torch.bfloat16).save_pretrained(narrow)
    for said, dtype in ((None, torch.bfloat16), ("float32", torch.float32)):
        run(RunFile.from_dict({**content, "model": str(narrow), "evaluate": None, "dtype": said}), force=True)
        assert {p.dtype for p in slimgraph.load(Path(content["out"]) / "pruned").parameters()} == {dtype}


def test_fine_tuning_and_comparing_are_given_what_the_file_says(
    finished: tuple[dict[str, Any], RunReport], content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of other modules, by stand-ins that note what they are called with."""
    called: dict[str, Any] = {}

    def finetune(model: Path, data: str, out: Path, **options: Any) -> str:
        called["finetune"] = {"data": data, **options}
        load_model(model).save_pretrained(out)
        return "FinetuneResult"

    def compare(contenders: Any, measures: Any, **_: Any) -> Any:
        called["compare"] = ([c.name for c in contenders], measures)
        return SimpleNamespace(to_dict=lambda: {"entries": 3}, to_markdown=lambda: "| a |")

    monkeypatch.setattr("slimgraph.run.finetune", finetune)
    monkeypatch.setattr("slimgraph.run.read_records", lambda *_, **__: [])
    monkeypatch.setattr("slimgraph.run.compare", compare)
    content["finetune"] = {"data": "records.json", "teacher": True, "epochs": 1}
    content["compare"] = {"texts": content["evaluate"]["texts"], "speed": True, "bos": "never"}
    shutil.copytree(finished[0]["out"], content["out"])
    (Path(content["out"]) / "run.yaml").write_text(RunFile.from_dict(content).to_yaml())
    report = run(RunFile.from_dict(content))
    assert called["finetune"]["data"] == "records.json"
    assert called["finetune"]["settings"] == FinetuneSettings(epochs=1)
    assert called["finetune"]["teacher"] == content["model"]
    assert not called["finetune"]["resume"]
    assert (called["finetune"]["dtype"], called["finetune"]["save_dtype"]) == (torch.float32, torch.float32)
    assert list(report.evaluations) == ["dense", "pruned", "finetuned"]
    names, measures = called["compare"]
    assert names == ["dense", "pruned", "finetuned"]
    assert (measures.seq_len, measures.tasks, measures.speed, measures.bos) == (128, None, Settings(), "never")
    assert (Path(content["out"]) / "comparison.md").read_text() == "| a |\n"


def test_all_four_steps_run(
    finished: tuple[dict[str, Any], RunReport], content: dict[str, Any], tmp_path: Path
) -> None:
    said = ["the cat sits under the tree .", "a dog runs .", "the old house is new ."]
    asked = ["the cat sees a dog", "the cat sees the tree"]
    records = [{"instruction": asked[i % 2], "output": said[i % 3]} for i in range(12)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    content["finetune"] = {"data": str(tmp_path / "records.json"), "epochs": 1, "batch": 4, "cutoff": 48}
    content["compare"] = {"texts": content["evaluate"]["texts"], "seq_len": 16}
    report = run(RunFile.from_dict(content))
    tuned, pruned = (load_model(report.checkpoints[name]).state_dict() for name in ("finetuned", "pruned"))
    assert tuned.keys() == pruned.keys()
    assert any(not tuned[name].equal(pruned[name]) for name in tuned)
    assert [e.name for e in report.comparison.entries] == ["dense", "pruned", "finetuned"]
    assert list(report.evaluations) == ["dense", "pruned", "finetuned"]
    table = (Path(content["out"]) / "comparison.md").read_text()
    assert all(name in table for name in ("dense", "pruned", "finetuned"))


@pytest.mark.parametrize(
    ("compared", "measured"),
    [
        ({"seq_len": 16, "tokens": 64}, []),
        ({"seq_len": 8, "tokens": 64}, ["dense", "pruned"]),
        ({"seq_len": 16}, ["dense", "pruned"]),
        ({"seq_len": 16, "tokens": 64, "bos": "never"}, ["dense", "pruned"]),
        ({"seq_len": 16, "tokens": 64, "texts": ["other.txt"]}, ["dense", "pruned"]),
    ],
)
def test_what_was_evaluated_is_not_measured_again(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compared: dict[str, Any], measured: list[str]
) -> None:
    text = Path(content["evaluate"]["texts"][0])
    other = shutil.copy(text, Path(content["out"]).parent / "other.txt")
    again: list[int] = []

    def counted(model: Any, *given: Any, **options: Any) -> Any:
        again.append(sum(p.numel() for p in model.parameters()))
        return perplexity(model, *given, **options)

    monkeypatch.setattr("slimgraph.compare.perplexity", counted)
    content["compare"] = {**compared, "texts": [str(other if "texts" in compared else text)]}
    found = run(RunFile.from_dict(content))
    assert again == [found.evaluations[name].parameters for name in measured]
    for entry in found.comparison.entries:
        (shown,) = entry.perplexities.values()
        assert (shown is found.evaluations[entry.name].perplexities[str(text)]) is not bool(measured)


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ({}, ["perplexities", "tasks"]),
        ({"tokens": 9}, ["tasks"]),
        ({"limit": 3}, ["perplexities"]),
        ({"tasks": ("piqa",)}, ["perplexities"]),
        ({"include_path": "there"}, ["perplexities"]),
        ({"bos": "never"}, []),
        ({"batch": 1}, ["perplexities", "tasks"]),
    ],
)
def test_scores_are_taken_over_where_the_same_is_asked(
    content: dict[str, Any], changed: dict[str, Any], known: list[str]
) -> None:
    asked = {**content["evaluate"], "tasks": ["boolq"], "limit": 5}
    compared = {**{k: v for k, v in asked.items() if k != "dense"}, **changed}
    plan = RunFile.from_dict({**content, "evaluate": asked, "compare": compared})
    scores = SimpleNamespace(percents=lambda: {"boolq": 60.0})
    measured = {"pruned": SimpleNamespace(perplexities={"a": 1.0}, tasks=scores)}
    report = RunReport(Path(content["out"]), evaluations=measured)
    given = _known(plan, plan.compare, report, "pruned")
    assert given == {k: v for k, v in (("perplexities", {"a": 1.0}), ("tasks", {"boolq": 60.0})) if k in known}
    assert _known(plan, plan.compare, report, "dense") == {}


def test_the_command(
    finished: tuple[dict[str, Any], RunReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**finished[0], "model": "another"}))
    assert cli._run(["run", str(file), "--set", f"model={finished[0]['model']}"]) == 0
    assert "pruned: there already, kept" in capsys.readouterr().out
    assert cli._run(["run", str(file), "--set", "evaluate.nothing=1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "evaluate.nothing" in error


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda p: p.stem)
def test_the_examples_are_run_files(file: Path) -> None:
    assert RunFile.from_file(file).passes.passes[-1].name == "verify"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize(("text", "sources"), [(None, []), ("a.txt", ["a.txt"]), (["a.txt", "b"], ["a.txt", "b"])])
def test_calibration_texts_are_none_one_or_several(text: Any, sources: list[str]) -> None:
    assert CalibrationSection.model_validate({"text": text}).sources == sources
