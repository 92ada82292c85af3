"""Tasks run by the real harness on a tiny model, from task files made here."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("lm_eval")

from slimgraph import tasks as module
from slimgraph.compare import Contender, Measures, compare
from slimgraph.errors import CalibrationError, EvaluationError
from slimgraph.evaluation import evaluate
from slimgraph.tasks import PAPER_METRICS, TaskScore, TaskScores, evaluate_tasks, load_tasks

MakeModel = Callable[..., nn.Module]
QUESTIONS = [("the old cat", ["sits", "under the tree"]), ("a dog", ["runs and sees", "is"]), ("the", ["house", "new"])]


def write_task(folder: Path, name: str, data: Path | str, metrics: tuple[str, ...] = ("acc", "acc_norm")) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks; their data lie at a path relative to the folder above."""
    rows = [{"question": q, "choices": c, "label": i % 2} for i, (q, c) in enumerate(QUESTIONS * 4)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("tiny_boolq", "tiny_arc_easy"):
        write_task(tmp_path / "tasks", name, "data/rows.jsonl")
    return tmp_path / "tasks"


def likelihood(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    given, answered = tokenizer(question)["input_ids"], tokenizer(answer)["input_ids"]
    ids = torch.tensor([[*given, *answered]])
    with torch.no_grad():
        log = model(ids).logits[0, len(given) - 1 : -1].log_softmax(-1)
    return float(log.gather(1, torch.tensor(answered)[:, None]).sum())


def test_the_harness_scores_the_model_that_is_given(tiny_llama: MakeModel, tiny_tokenizer: Any, folder: Path) -> None:
    model = tiny_llama(seed=3)
    found = evaluate_tasks(model, tiny_tokenizer, ["tiny_boolq"], include_path=folder, batch=3)
    right, right_by_length = 0, 0
    for i, (question, answers) in enumerate(QUESTIONS * 4):
        scores = [likelihood(model, tiny_tokenizer, question, a) for a in answers]
        by_length = [s / len(a) for s, a in zip(scores, answers, strict=True)]
        right += scores.index(max(scores)) == i % 2
        right_by_length += by_length.index(max(by_length)) == i % 2
    (score,) = found.scores
    assert score.documents == 12
    assert score.metrics["acc"] == pytest.approx(right / 12)
    assert score.metrics["acc_norm"] == pytest.approx(right_by_length / 12)
    assert score.errors["acc"] == pytest.approx(math.sqrt(right / 12 * (1 - right / 12) / 11))
    assert score.counted == "acc"  # the paper's for BoolQ
    assert found.average == score.metrics["acc"]
    assert "tiny_boolq" in repr(found)


def test_paper_takes_a_folders_tasks_by_the_ends_of_their_names(
    tiny_llama: MakeModel, tiny_tokenizer: Any, folder: Path
) -> None:
    for name in PAPER_METRICS.keys() - {"boolq", "arc_easy"}:
        write_task(folder, f"tiny_{name}", "data/rows.jsonl")
    found = evaluate_tasks(tiny_llama(), tiny_tokenizer, ["paper"], include_path=folder, limit=2)
    assert [s.name for s in found.scores] == [f"tiny_{name}" for name in PAPER_METRICS]
    assert [s.counted for s in found.scores] == list(PAPER_METRICS.values())
    assert {s.documents for s in found.scores} == {2}
    assert json.loads(json.dumps(found.to_dict()))["averaged"]["tiny_openbookqa"] == "acc_norm"


def test_the_average_takes_one_metric_of_each_task() -> None:
    one = TaskScore("a", {"acc": 0.5, "acc_norm": 0.7}, {"acc": 0.3, "acc_norm": 0.2}, 9, "acc")
    other = TaskScore("b", {"acc": 0.1, "acc_norm": 0.9}, {"acc": 0.1, "acc_norm": 0.4}, 9, "acc_norm")
    neither = TaskScore("c", {"f1": 0.1}, {}, 9, None)
    scores = TaskScores((one, other, neither), None, 1.0)
    assert scores.average == pytest.approx(0.7)
    assert scores.average_error == pytest.approx(0.25)
    assert scores.percents() == pytest.approx({"a": 50, "b": 90, "average": 70})
    assert "f1 0.1000" in repr(scores)


def test_nothing_of_the_callers_is_changed(
    tiny_llama: MakeModel, tiny_tokenizer: Any, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(folder)  # in no repository: the harness would ask git
    model = tiny_llama().train()
    padding, state, ours = tiny_tokenizer.pad_token, torch.get_rng_state(), random.getstate()
    evaluate_tasks(model, tiny_tokenizer, ["tiny_boolq"], include_path=folder, limit=1)
    assert model.training
    assert tiny_tokenizer.pad_token == padding
    assert torch.get_rng_state().equal(state)
    assert random.getstate() == ours
    assert capfd.readouterr() == ("", "")


def test_a_smaller_batch_is_tried(
    tiny_llama: MakeModel, tiny_tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    real = module._evaluate

    def little_room(*arguments: Any) -> Any:
        tried.append(arguments[-2])
        if arguments[-2] > 2:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(module, "_evaluate", little_room)
    evaluate_tasks(tiny_llama(), tiny_tokenizer, ["tiny_*"], include_path=folder, limit=1, batch=8)
    assert tried == [8, 4, 2, 2]  # what fits the first task is what the second begins with


def test_a_start_token_on_every_prompt(tiny_llama: MakeModel, tiny_tokenizer: Any, folder: Path) -> None:
    import copy

    starting = copy.deepcopy(tiny_tokenizer)
    starting.add_special_tokens({"bos_token": "the"})
    model, seen = tiny_llama(), []
    model.register_forward_hook(lambda _, given, options, out: seen.append(given[0]), with_kwargs=True)
    evaluate_tasks(model, starting, ["tiny_boolq"], include_path=folder, bos="always", limit=2)
    assert all((ids[:, 0] == starting.bos_token_id).all() for ids in seen)
    seen.clear()
    evaluate_tasks(model, starting, ["tiny_boolq"], include_path=folder, limit=2)
    assert not all((ids[:, 0] == starting.bos_token_id).all() for ids in seen)


def test_a_task_that_does_not_exist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    class OnlyMine(TaskManager):  # the harness's own 14,000 take seconds to index
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(module, "_task_manager", lambda: OnlyMine)
    with pytest.raises(EvaluationError, match=r"no task is called 'tiny_boolk'.*did you mean tiny_boolq"):
        load_tasks(["tiny_boolk"], include_path=folder)
    with pytest.raises(EvaluationError, match="does not exist"):
        load_tasks(["tiny_boolq"], include_path=folder / "nowhere")
    with pytest.raises(EvaluationError, match="has no task files"):
        load_tasks(["tiny_boolq"], include_path=folder.parent / "data")
    with pytest.raises(EvaluationError, match="no task was named"):
        load_tasks([])


def test_a_hub_that_cannot_be_reached(folder: Path) -> None:
    (folder / "far.yaml").write_text(
        yaml.safe_dump({"task": "far", "dataset_path": "nobody/nothing", "output_type": "multiple_choice"})
    )
    begun = time.perf_counter()
    with pytest.raises(EvaluationError, match=r"data of task far.*hub cannot be reached.*--include-path"):
        load_tasks(["far"], include_path=folder)
    assert time.perf_counter() - begun < 10


def test_data_that_are_not_there(folder: Path) -> None:
    write_task(folder, "lost", "data/lost.jsonl")
    with pytest.raises(EvaluationError, match="task lost"):
        load_tasks(["lost"], include_path=folder)


def test_a_task_that_does_not_fit_its_data(tiny_llama: MakeModel, tiny_tokenizer: Any, folder: Path) -> None:
    write_task(folder, "odd", "data/rows.jsonl")
    task = yaml.safe_load((folder / "odd.yaml").read_text()) | {"doc_to_choice": "answers"}
    (folder / "odd.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(EvaluationError, match="task odd"):
        evaluate_tasks(tiny_llama(), tiny_tokenizer, ["odd"], include_path=folder)


def test_texts_and_tasks_in_one_result(
    tiny_llama: MakeModel, tiny_tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("the cat sits under the old tree .\n" * 20)
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    found = evaluate(
        tiny_llama(), tiny_tokenizer, texts=texts, tasks=["tiny_boolq"], include_path=folder, limit=2, seq_len=16
    )
    assert list(found.perplexities) == [str(t) for t in texts]
    assert found.perplexities[str(texts[0])].value == found.perplexities[str(texts[1])].value
    assert set(found.to_dict()) == {"parameters", "dtype", "seq_len", "start", "perplexity", "tasks"}
    assert "perplexity" in repr(found)
    assert "average" in repr(found)
    with pytest.raises(EvaluationError, match="nothing to measure"):
        evaluate(tiny_llama(), tiny_tokenizer)


def test_a_token_that_the_model_lacks_is_told_wherever_it_stands(
    tiny_llama: MakeModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(". " * 40 + "tree " * 20)
    model = tiny_llama(vocab_size=1 + tiny_tokenizer(".")["input_ids"][0])
    with pytest.raises(CalibrationError, match=r"the vocabulary of LlamaForCausalLM: use the model's own tokenizer$"):
        evaluate(model, tiny_tokenizer, texts=[tmp_path / "text.txt"], seq_len=16)
    contenders = [Contender("a", lambda: model, tiny_tokenizer)]
    with pytest.raises(CalibrationError, match="the vocabulary of LlamaForCausalLM"):
        compare(contenders, Measures(texts=[tmp_path / "text.txt"], seq_len=16))
