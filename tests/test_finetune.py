"""Fine-tuning: what is learned, what is left alone, that a stopped run goes on exactly, and what bad input is told."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

import slimgraph
from slimgraph import checkpoint, cli
from slimgraph.checkpoint import load_manifest
from slimgraph.errors import CheckpointError, DataError, ModelError, NumericsError, RecipeError
from slimgraph.finetune import FinetuneSettings, finetune
from slimgraph.finetune.adapters import adapted, projections
from slimgraph.finetune.processes import Processes
from slimgraph.finetune.records import IGNORED, Example, Record, collate, encode, prompt, read_records
from slimgraph.finetune.training import Training, learning_rate, loss_sum
from slimgraph.progress import SILENT, Progress, Tick

SHORT = FinetuneSettings(epochs=2, batch=4, micro_batch=2, rank=4, learning_rate=1e-2, cutoff=60, save_steps=1)
WORDS = ["cat", "dog", "tree", "house", "old", "new"]
RECORDS = [
    {"instruction": f"the {word} sees a {other}", "input": "", "output": f"{other} runs under the {word} ."}
    for word in WORDS
    for other in WORDS[:3]
]


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    given = torch.arange(20).reshape(2, 10) if ids is None else ids
    with torch.no_grad():
        found: Tensor = model(input_ids=given).logits
    return found


class StoppingProgress(Progress):
    """Stands for somebody who stops the run after so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    @contextmanager
    def __call__(self, stage: str, total: int | None = None) -> Iterator[Tick]:
        outer = self

        class Stopping(Tick):
            def __call__(self, steps: int = 1) -> None:
                super().__call__(steps)
                if stage == "fine-tune" and self.done >= outer.after:
                    raise KeyboardInterrupt

        yield Stopping(stage, total)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return tiny_tokenizer


@pytest.fixture(scope="module")
def dense_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "model"
    tiny_llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pruned(dense_dir: Path) -> slimgraph.Result:
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    return slimgraph.prune(slimgraph.load(dense_dir), ids, ratio=0.2, round_to=1, recipe="slimllm")


@pytest.fixture(scope="module")
def pruned_dir(
    pruned: slimgraph.Result, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Uneven widths, and biases that the refit added."""
    manifest = pruned.manifest()
    widths = [shape[1] for name, shape in manifest.shapes.items() if name.endswith("down_proj.weight")]
    assert len(set(widths)) == 2, "the layers must differ for the tests to say something"
    assert manifest.added
    model = copy.deepcopy(pruned.model)
    assert model is not None
    return checkpoint.save(model, tmp_path_factory.mktemp("pruned") / "model", manifest, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tuned_dir(pruned_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "model"
    finetune(pruned_dir, RECORDS, out, settings=SHORT)
    return out


# ---- records ----


def test_records_are_read_from_every_form(tmp_path: Path) -> None:
    rows = [*RECORDS[:2], {"instruction": "a", "output": "b", "source": "elsewhere"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    expected = read_records(rows)
    assert expected[2] == Record("a", "", "b")
    assert read_records(tmp_path / "a.json") == read_records(str(tmp_path / "a.jsonl")) == expected
    assert read_records(tmp_path / "a.json", limit=1) == expected[:1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "has no records"),
        ('[{"instruction": "a", "output": "b"}, {"output": "b"}]', "record 2 of .* has no 'instruction'.*keys output"),
        ('[{"instruction": "a"}]', "record 1 of .* has no 'output'"),
        ('[{"instruction": " ", "output": "b"}]', "record 1 of .* has no 'instruction': found ' '"),
        ('[{"instruction": "a", "output": "b", "input": 3}]', "record 1 .*'input' is 3"),
        ("[7]", "record 1 of .* is 7"),
        ('{"instruction": "a"}', "holds a dict, expected a list"),
        ("[", "is not JSON"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=said):
        read_records(tmp_path / "bad.json")


def test_bad_places_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n{')
    for place, said in (("a.txt", "suffix '.txt'"), ("none.json", "cannot be read"), ("a.jsonl", "line 2 is not JSON")):
        with pytest.raises(DataError, match=said):
            read_records(tmp_path / place)
    with pytest.raises(DataError, match="the hub cannot be reached"):
        read_records("somebody/something")


def test_a_data_set_is_read_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        asked.update(options, name=name, config=config)
        return [*RECORDS, {"text": "no record"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_records("somebody/something:some@validation", limit=3) == read_records(RECORDS[:3])
    assert (asked["name"], asked["config"], asked["split"]) == ("somebody/something", "some", "validation")
    with pytest.raises(
        DataError, match="record 19 of somebody/something has no 'instruction': found only the keys text"
    ):
        read_records("somebody/something")


def test_prompts_are_alpacas() -> None:
    with_input = prompt(Record("do", "this", "done"))
    assert with_input.endswith("### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n")
    assert "paired with an input" in with_input
    without = prompt(Record("do", "", "done"))
    assert without.endswith("### Instruction:\ndo\n\n### Response:\n")
    assert "input" not in without.lower()


def test_the_prompt_ends_where_the_answer_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    record = Record("the cat", "", "runs under a tree")
    (masked,) = encode([record], tokenizer, cutoff=999, mask_prompt=True)
    assert tokenizer.decode(masked.ids[masked.learned_from :]) == record.output
    assert masked.learned == 4
    (whole,) = encode([record], tokenizer, cutoff=999, mask_prompt=False)
    assert (whole.ids, whole.learned) == (masked.ids, len(masked.ids) - 1)


def test_an_end_is_marked_where_there_is_room(tokenizer: PreTrainedTokenizerFast) -> None:
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = "."
    record = Record("the cat", "", "runs")
    (example,) = encode([record], ending, cutoff=999, mask_prompt=True)
    assert example.ids[-1] == ending.eos_token_id
    assert example.learned == 2
    (cut,) = encode([record], ending, cutoff=len(example.ids) - 1, mask_prompt=True)
    assert cut.ids == example.ids[:-1]


def test_what_has_nothing_to_learn_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [Record("the cat", "", "runs"), Record("cat " * 100, "", "runs")]
    assert len(encode(records, tokenizer, cutoff=60, mask_prompt=True)) == 1
    with pytest.raises(DataError, match="begins within the first 3 tokens"):
        encode(records, tokenizer, cutoff=3, mask_prompt=True)


# ---- loss ----


def test_masked_tokens_do_not_enter_the_loss(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    example = Example(tuple(range(5, 15)), learned_from=6)
    batch = collate([example, Example((1, 2, 3), learned_from=1)])
    found = logits(tiny_llama(), batch.ids)
    by_hand = -found.log_softmax(-1)
    expected = sum(float(by_hand[0, t - 1, example.ids[t]]) for t in range(6, 10))
    expected += sum(float(by_hand[1, t - 1, (1, 2, 3)[t]]) for t in (1, 2))
    assert float(loss_sum(found, batch.labels)) == pytest.approx(expected, rel=1e-5)
    changed = found.clone()
    changed[0, :5] += torch.randn_like(changed[0, :5])  # what predicts the prompt
    changed[1, 2:] += 1  # the last token and padding predict nothing
    assert torch.equal(loss_sum(changed, batch.labels), loss_sum(found, batch.labels))


def test_learning_the_answers_only_is_another_thing(
    pruned_dir: Path, tuned_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = FinetuneSettings(**{**SHORT.to_dict(), "mask_prompt": False})
    finetune(pruned_dir, RECORDS, tmp_path / "out", settings=settings)
    assert not torch.equal(logits(slimgraph.load(tmp_path / "out")), logits(slimgraph.load(tuned_dir)))


def test_a_teacher_that_is_the_student_has_nothing_to_teach() -> None:
    found = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, 4, 5], [IGNORED, IGNORED, 1, 2, IGNORED]])
    same = loss_sum(found, labels, found.detach(), weight=1.0, temperature=3.0)
    assert same.item() == pytest.approx(0, abs=1e-5)
    (gradient,) = torch.autograd.grad(same, found)
    assert gradient.abs().max() < 1e-6


def test_the_distillation_loss_is_its_definition() -> None:
    mine, guide = torch.randn(1, 3, 5, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[4, IGNORED, 2]])
    p, q = (guide[0, 1] / 2).softmax(0), (mine[0, 1] / 2).softmax(0)
    divergence = (p * (p / q).log()).sum()
    own = functional.cross_entropy(mine[0, 1:2], labels[0, 2:])
    assert torch.allclose(loss_sum(mine, labels, guide, 0.3, 2.0), 0.7 * own + 0.3 * 4 * divergence)


def test_a_teacher_pulls_towards_itself(
    pruned_dir: Path, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tokenizer: Any
) -> None:
    teacher = tiny_llama(seed=1)
    teacher.lm_head.weight.data *= 10  # so that it is sure of something
    settings = FinetuneSettings(**{**SHORT.to_dict(), "distillation": 1.0, "temperature": 1.0, "epochs": 4})
    finetune(pruned_dir, RECORDS, tmp_path / "out", settings=settings, teacher=teacher)
    batch = collate(encode(read_records(RECORDS), tokenizer, cutoff=60, mask_prompt=True))
    guide = logits(teacher, batch.ids)

    def distance(directory: Path) -> float:
        return float(loss_sum(logits(slimgraph.load(directory), batch.ids), batch.labels, guide, 1.0, 1.0))

    assert distance(tmp_path / "out") < 0.9 * distance(pruned_dir)


# ---- what is trained ----


def test_adapters_go_on_every_projection_of_the_layers(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    linear = {name for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    assert set(projections(model)) == linear - {"lm_head"}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=64, n_embd=24, n_layer=2, n_head=4))
    assert len(projections(gpt2)) == 8
    with pytest.raises(ModelError, match="no linear modules inside numbered layers"):
        projections(nn.Sequential(nn.Linear(2, 2)))


def test_what_is_not_adapted_stays_to_the_last_bit(pruned_dir: Path, tuned_dir: Path) -> None:
    before, after = (slimgraph.load(each).state_dict() for each in (pruned_dir, tuned_dir))
    adapted_weights = {f"{name}.weight" for name in projections(slimgraph.load(pruned_dir))}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == adapted_weights


def test_biases_are_trained_where_asked_for(pruned_dir: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(**{**SHORT.to_dict(), "train_biases": True})
    result = finetune(pruned_dir, RECORDS, tmp_path / "out", settings=settings)
    added = load_manifest(pruned_dir).added  # type: ignore[union-attr]
    before, after = (slimgraph.load(each).state_dict() for each in (pruned_dir, tmp_path / "out"))
    assert all(not torch.equal(before[name], after[name]) for name in added)
    without = finetune(pruned_dir, RECORDS, tmp_path / "plain", settings=SHORT)
    assert result.trained - without.trained == sum(math.prod(shape) for shape in added.values())


def test_merged_equals_unmerged(pruned_dir: Path) -> None:
    model = slimgraph.load(pruned_dir, dtype=torch.float64)
    bare = logits(model)
    with adapted(model, FinetuneSettings(rank=3, train_biases=True)) as adapters:
        with torch.no_grad():
            for parameter in adapters.trained.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        adapters.model.eval()
        unmerged = logits(adapters.model)
        adapters.merge()
    assert (unmerged - bare).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-9, atol=1e-9)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_merge_that_fails_leaves_all_weights_as_they_were(pruned_dir: Path, bad: float) -> None:
    model = slimgraph.load(pruned_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def merge_with_bad_factors() -> None:
        with adapted(model, FinetuneSettings(rank=3)) as adapters:
            with torch.no_grad():
                for parameter in adapters.trained.values():
                    parameter.fill_(0.1)
                parameter.view(-1)[-1] = bad
            adapters.merge()

    with pytest.raises(NumericsError, match=r"cannot be merged: .*down_proj would become NaN or infinite"):
        merge_with_bad_factors()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", sorted(decoders.FAMILIES))
def test_families_take_adapters_and_merge_them(family: str) -> None:
    model = decoders.make(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with adapted(model, FinetuneSettings(rank=3)) as adapters:
        with torch.no_grad():
            for parameter in adapters.trained.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        adapters.model.eval()
        unmerged = logits(adapters.model)
        adapters.merge()
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-9, atol=1e-9)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {f"{name}.weight" for name in projections(model)}


def test_a_failed_run_leaves_the_model_as_it_was(pruned_dir: Path, tmp_path: Path, tokenizer: Any) -> None:
    model = slimgraph.load(pruned_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = FinetuneSettings(**{**SHORT.to_dict(), "train_biases": True})
    with pytest.raises(KeyboardInterrupt):
        finetune(model, RECORDS, tmp_path / "out", tokenizer=tokenizer, settings=settings, progress=StoppingProgress(2))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "out").exists()


# ---- the result ----


def test_the_loss_falls(pruned_dir: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(**{**SHORT.to_dict(), "epochs": 4, "held_out": 0.2})
    result = finetune(pruned_dir, RECORDS, tmp_path / "out", settings=settings)
    assert result.loss_before is not None
    assert result.loss_after is not None
    assert result.loss_after < result.loss_before - 0.1
    assert (result.held_out, result.records, result.steps) == (4, 14, 16)
    assert "loss" in repr(result)
    assert json.dumps(result.to_dict())


def test_the_result_is_a_pruned_checkpoint(pruned_dir: Path, tuned_dir: Path) -> None:
    before, after = load_manifest(pruned_dir), load_manifest(tuned_dir)
    assert before is not None
    assert after is not None
    assert (after.shapes, after.added, after.plan) == (before.shapes, before.added, before.plan)
    assert after.recipe["passes"] == before.recipe["passes"]
    (note,) = after.recipe["notes"]["finetune"]
    assert FinetuneSettings.from_dict(note["settings"]) == SHORT
    assert note["data"] == "in memory"
    assert note["loss_after"] < note["loss_before"]
    assert slimgraph.Recipe.from_dict(after.recipe).passes
    assert not [file for file in tuned_dir.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not tuned_dir.with_name("model.checkpoints").exists()


def test_a_second_run_is_noted_after_the_first(tuned_dir: Path, tmp_path: Path) -> None:
    finetune(tuned_dir, RECORDS, tmp_path / "out", settings=SHORT)
    assert len(load_manifest(tmp_path / "out").recipe["notes"]["finetune"]) == 2  # type: ignore[union-attr]


def test_a_result_remembers_what_it_was_trained_on(
    dense_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    result = slimgraph.prune(slimgraph.load(dense_dir), ids, ratio=0.2, round_to=1, recipe="random")
    for name in ("a", "b"):
        finetune(result, RECORDS, tmp_path / name, tokenizer=tokenizer, settings=SHORT)
    result.save(tmp_path / "c")
    noted = {name: load_manifest(tmp_path / name).recipe["notes"]["finetune"] for name in "abc"}  # type: ignore[union-attr]
    assert {name: len(notes) for name, notes in noted.items()} == {"a": 1, "b": 2, "c": 2}


def test_a_new_process_loads_the_same(tuned_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch, slimgraph; from safetensors.torch import save_file; "
        "from transformers import AutoModelForCausalLM; model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "save_file({'x': model(torch.arange(20).reshape(2, 10)).logits.detach()}, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tuned_dir, tmp_path / "x"], check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "x")["x"], logits(slimgraph.load(tuned_dir)))


def test_a_dense_model_stays_an_ordinary_one(dense_dir: Path, tmp_path: Path) -> None:
    result = finetune(dense_dir, RECORDS, tmp_path / "out", settings=SHORT)
    assert load_manifest(tmp_path / "out") is None
    assert torch.equal(logits(slimgraph.load(tmp_path / "out")), logits(result.model))
    assert not torch.equal(logits(result.model), logits(slimgraph.load(dense_dir)))


def test_weights_are_saved_in_another_dtype(pruned_dir: Path, tuned_dir: Path, tmp_path: Path) -> None:
    result = finetune(pruned_dir, RECORDS, tmp_path / "out", settings=SHORT, save_dtype=torch.bfloat16)
    assert next(result.model.parameters()).dtype == torch.float32
    expected = slimgraph.load(tuned_dir).state_dict()
    found = slimgraph.load(tmp_path / "out").state_dict()
    assert all(found[name].equal(expected[name].bfloat16()) for name in expected)


def test_a_narrow_model_stays_narrow(pruned_dir: Path, tmp_path: Path) -> None:
    result = finetune(pruned_dir, RECORDS, tmp_path / "out", settings=SHORT, dtype=torch.bfloat16)
    assert result.loss_before is not None
    assert result.loss_after is not None
    assert result.loss_after < result.loss_before - 0.1
    assert {value.dtype for value in slimgraph.load(tmp_path / "out").state_dict().values()} == {torch.bfloat16}
    with adapted(slimgraph.load(pruned_dir, dtype=torch.bfloat16), SHORT) as adapters:
        assert {parameter.dtype for parameter in adapters.trained.values()} == {torch.float32}


def test_what_prune_returns_is_taken(
    pruned: slimgraph.Result, pruned_dir: Path, tuned_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    unmarked: Any = copy.deepcopy(pruned.model)
    unmarked.config.quantization_config = None
    with pytest.raises(CheckpointError, match="manifest"):  # without its manifest it would be saved as something else
        finetune(unmarked, RECORDS, tmp_path / "out", tokenizer=tokenizer, settings=SHORT)
    expected = logits(slimgraph.load(tuned_dir))
    for name, model in (("module", copy.deepcopy(pruned.model)), ("result", pruned)):
        finetune(model, RECORDS, tmp_path / name, tokenizer=tokenizer, settings=SHORT)
        assert torch.equal(logits(slimgraph.load(tmp_path / name)), expected)


# ---- going on ----


@pytest.mark.parametrize("stop", [1, 5])
def test_a_stopped_run_goes_on_exactly(pruned_dir: Path, tuned_dir: Path, tmp_path: Path, stop: int) -> None:
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned_dir, RECORDS, out, settings=SHORT, progress=StoppingProgress(stop))
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.name for file in left} == {"trained.safetensors", "optimiser.safetensors", "state.json"}
    with pytest.raises(CheckpointError, match="left from an earlier run"):
        finetune(pruned_dir, RECORDS, out, settings=SHORT)
    torch.manual_seed(stop)  # the state of the global generator must not matter
    result = finetune(pruned_dir, RECORDS, out, settings=SHORT, resume=True)
    assert result.steps == 10
    one, other = (slimgraph.load(each).state_dict() for each in (out, tuned_dir))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_training_is_not_lost_where_saving_fails(
    pruned_dir: Path, tuned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(CheckpointError, match="disk full"):
            finetune(pruned_dir, RECORDS, tmp_path / "model", settings=SHORT)
    assert not (tmp_path / "model").exists()
    finetune(pruned_dir, RECORDS, tmp_path / "model", settings=SHORT, resume=True)
    assert torch.equal(logits(slimgraph.load(tmp_path / "model")), logits(slimgraph.load(tuned_dir)))


def test_only_the_same_run_goes_on(pruned_dir: Path, dense_dir: Path, tmp_path: Path) -> None:
    def go_on(*, directory: Path = pruned_dir, data: Any = RECORDS, **changes: Any) -> None:
        settings = FinetuneSettings(**{**SHORT.to_dict(), **changes})
        finetune(directory, data, tmp_path / "out", settings=settings, resume=True)

    with pytest.raises(CheckpointError, match="no checkpoint of a run"):
        go_on()
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned_dir, RECORDS, tmp_path / "out", settings=SHORT, progress=StoppingProgress(1))
    with pytest.raises(CheckpointError, match=r"of a run with learning_rate 0\.01, this one has 0\.1"):
        go_on(learning_rate=0.1)
    with pytest.raises(CheckpointError, match="of a run with data"):
        go_on(data=RECORDS[::-1])
    with pytest.raises(CheckpointError, match="of a run with model"):
        go_on(directory=dense_dir)
    file = next(tmp_path.rglob("optimiser.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        go_on()
    file.write_bytes(whole)
    trained = next(tmp_path.rglob("trained.safetensors"))
    save_file({"x": torch.ones(1)}, trained)
    with pytest.raises(CheckpointError, match=r"is damaged .*other parameters"):
        go_on()


def test_force_starts_afresh(pruned_dir: Path, tuned_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned_dir, RECORDS, out, settings=SHORT, progress=StoppingProgress(1))
    finetune(pruned_dir, RECORDS, out, settings=SHORT, force=True)
    assert torch.equal(logits(slimgraph.load(out)), logits(slimgraph.load(tuned_dir)))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(pruned_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(RECORDS[:11]))  # of the last step one process gets nothing
    settings = {"epochs": 2, "batch": 3, "micro-batch": 1, "dropout": 0, "lr": 1e-3, "cutoff": 60, "held-out": 0.1}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = ["-m", "slimgraph", "finetune", pruned_dir, "--data", tmp_path / "data.json", *options, "--out"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for run, out in (([sys.executable], "one"), (two, "two")):
        subprocess.run([*run, *command, tmp_path / out], check=True, capture_output=True)
    one, other = (slimgraph.load(tmp_path / out).state_dict() for out in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


# ---- memory ----


class Forgetful(nn.Module):
    """A model for which more than so many records at once are too many."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 PiB.")
        return self.model(input_ids=input_ids, **options)


def gradients(model: nn.Module, micro_batch: int, most: int = 99) -> tuple[dict[str, Tensor], Training]:
    settings = FinetuneSettings(batch=8, micro_batch=micro_batch)
    trained = dict(model.named_parameters())
    training = Training(Forgetful(model, most), trained, settings, Processes(torch.device("cpu")), SILENT)
    examples = [Example(tuple(range(length)), 2) for length in (9, 4, 12, 5, 8, 3, 7)]
    training._step(examples, 0.0)
    return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}, training


def test_a_smaller_micro_batch_computes_the_same(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    whole, _ = gradients(tiny_llama().double(), 8)
    parts, training = gradients(tiny_llama().double(), 8, most=2)
    assert training.micro_batch == 2
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-12)


def test_a_record_too_many_is_said(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(ModelError, match=r"one record alone does not fit .*CUDA out of memory.*smaller cutoff"):
        gradients(tiny_llama(), 4, most=0)


# ---- settings and refusals ----


def test_the_learning_rate_rises_and_falls() -> None:
    settings = FinetuneSettings(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(one > other > 0 for one, other in itertools.pairwise(rates[4:]))
    assert learning_rate(settings, 0, 8) == 1.0  # too few steps for a warm-up


def test_the_defaults_are_the_published_ones() -> None:
    s = FinetuneSettings()
    assert (s.epochs, s.learning_rate, s.batch, s.rank, s.alpha, s.dropout, s.cutoff) == (2, 1e-4, 64, 8, 16, 0.05, 256)
    assert FinetuneSettings.from_dict({}) == s
    assert FinetuneSettings.from_dict(json.loads(json.dumps(SHORT.to_dict()))) == SHORT


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"distillation": 2}, "distillation is 2"),
        ({"rnak": 4}, "rnak"),
        ({"epochs": "many"}, "epochs"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"finetune: {said}"):
        FinetuneSettings.from_dict(wrong)


def test_refusals(pruned_dir: Path, dense_dir: Path, tmp_path: Path, tokenizer: Any) -> None:
    def refused(error: type[Exception], said: str, *, model: Any = dense_dir, data: Any = RECORDS, **more: Any) -> None:
        changes = more.pop("changes", {})
        settings = FinetuneSettings(**{**SHORT.to_dict(), **changes})
        with pytest.raises(error, match=said):
            finetune(model, data, tmp_path / "out", settings=settings, **more)
        assert not list(tmp_path.iterdir())

    refused(ModelError, "not a model|no config.json|does not exist", model=tmp_path)
    refused(ModelError, "give tokenizer=", model=slimgraph.load(dense_dir))
    refused(ModelError, "expected a transformers model", model=nn.Linear(2, 2), tokenizer=tokenizer)
    refused(DataError, "expected some to train on", data=RECORDS[:1])
    refused(ModelError, "train_biases was asked for", changes={"train_biases": True})
    long = [{**each, "instruction": "cat " * 100} for each in RECORDS]
    refused(ModelError, "ask for a cutoff of at most 64", data=long, changes={"cutoff": 200})
    broken = slimgraph.load(dense_dir)
    next(broken.parameters()).data[0, 0] = math.nan
    refused(NumericsError, "NaN or infinite", model=broken, tokenizer=tokenizer)


def test_a_place_that_is_taken_is_refused_at_once(pruned_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        finetune("/no/model", "/no/data.json", pruned_dir)


def test_a_teacher_with_other_tokens_is_refused(
    pruned_dir: Path, dense_dir: Path, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tokenizer: Any
) -> None:
    tiny_llama(vocab_size=72).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="the teacher knows 72 tokens and the model 64"):
        finetune(pruned_dir, RECORDS, tmp_path / "out", settings=SHORT, teacher=tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"car"'))
    with pytest.raises(ModelError, match="another tokenizer"):
        finetune(pruned_dir, RECORDS, tmp_path / "out", settings=SHORT, teacher=tmp_path / "other")


def test_a_diverging_run_is_stopped(pruned_dir: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(**{**SHORT.to_dict(), "learning_rate": 1e30})
    with pytest.raises(NumericsError, match=r"in step .* lower learning rate|held-out"):
        finetune(pruned_dir, RECORDS, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_without_peft_the_extra_is_named(pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"slimgraph\[finetune\]"):
        finetune(pruned_dir, RECORDS, tmp_path / "out", settings=SHORT)


# ---- the command ----


def test_the_command(
    pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimgraph.commands import options

    monkeypatch.setattr(options, "Progress", lambda **_: SILENT)
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    narrow = shutil.copytree(pruned_dir, tmp_path / "narrow")
    slimgraph.load(pruned_dir, dtype=torch.bfloat16).save_pretrained(narrow)  # type: ignore[operator]
    command = ["finetune", narrow, "--data", tmp_path / "data.json", "--out", tmp_path / "out", "--batch", 4]
    result = tmp_path / "result.json"
    assert cli._run([*map(str, command), "--cutoff", "60", "--json", str(result)]) == 0
    assert next(slimgraph.load(tmp_path / "out").parameters()).dtype == torch.bfloat16
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(result.read_text())
    assert f"loss {found['loss_before']:.4f} -> {found['loss_after']:.4f}" in out
    note = load_manifest(tmp_path / "out").recipe["notes"]["finetune"][0]  # type: ignore[union-attr]
    assert note["settings"] == {**FinetuneSettings().to_dict(), "batch": 4, "cutoff": 60}
    assert cli._run([*map(str, command), "--rank", "0"]) == 1
    assert capsys.readouterr().err == "slimgraph: error: finetune: rank is 0; expected at least 1\n"
