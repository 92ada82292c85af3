from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast

import slimgraph
from slimgraph import cli, demo, pipeline
from slimgraph.capacity import memory_needed
from slimgraph.checkpoint import load_manifest
from slimgraph.commands import options, pruning
from slimgraph.perplexity import perplexity
from slimgraph.pretrained import load_model, load_tokenizer
from slimgraph.progress import SILENT
from slimgraph.recipe import method
from slimgraph.shards import run_folder

SMALL = ["--samples", "4", "--seq-len", "16"]
PUBLISHED = [*SMALL, "--method", "slimllm"]


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    monkeypatch.setattr(options, "Progress", lambda **_: SILENT)  # what shows depends on how fast the machine is

    def call(*arguments: object) -> Run:
        code = cli._run([str(each) for each in arguments])
        return Run(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def model_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("option", ["--plan", "--scores"])
def test_a_file_that_is_there_is_not_written_over(
    option: str, run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    file.write_text("{}")
    command = ["prune", model_dir, "--out", tmp_path / "out", option, file, "--calibration", text, *PUBLISHED]
    assert "mine.json exists, and would be written; give another path, or --force" in run(*command).err
    assert file.read_text() == "{}"
    assert run(*command, "--force").code == 0
    assert len(file.read_text()) > 2


def test_a_model_is_not_replaced_by_what_is_made_of_it(run: Callable[..., Run], model_dir: Path) -> None:
    before = {file.name: file.read_bytes() for file in model_dir.iterdir()}
    done = run("prune", model_dir, "--out", model_dir, "--force", *PUBLISHED)
    assert (done.code, "the model itself, which would be lost" in done.err) == (1, True)
    assert {file.name: file.read_bytes() for file in model_dir.iterdir()} == before


def test_a_stopped_program_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        run_folder(tmp_path / "out").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "prune_checkpoint", stop)
    assert cli._run(["prune", str(model_dir), "--out", str(tmp_path / "out"), "--stream", "--samples", "2"]) == 130
    seen = capsys.readouterr().err
    assert "keeps what is finished; repeat the command with --resume" in " ".join(seen.split())
    assert seen.endswith("slimgraph: error: stopped\n")


@pytest.mark.parametrize(("target", "code"), [("| true", 141), ("> /dev/full", 1)])
def test_output_that_cannot_be_written(target: str, code: int, model_dir: Path) -> None:
    """Whoever reads it has enough, or a full disk."""
    line = f"'{sys.executable}' -m slimgraph inspect '{model_dir}' {target}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("No space left on device" in done.stderr) == (code == 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text("the old cat sits under a tree and the dog runs . a new house is under the tree .\n" * 60)
    return file


@pytest.fixture(scope="module")
def pruned_dir(model_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "model"
    assert cli._run(["prune", str(model_dir), "--out", str(out), "--calibration", str(text), *PUBLISHED]) == 0
    return out


# ---- what works ----


def test_prune_streams_when_asked_or_when_memory_is_short(
    run: Callable[..., Run], model_dir: Path, text: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    calls: list[Path] = []
    prune_checkpoint = pruning.prune_checkpoint
    monkeypatch.setattr(pruning, "prune_checkpoint", lambda *a, **k: calls.append(a[1]) or prune_checkpoint(*a, **k))

    def weights(directory: Path) -> dict[str, torch.Tensor]:
        return {n: t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}

    common = ["prune", model_dir, "--calibration", text, *PUBLISHED]
    needed = memory_needed(model_dir, torch.float32)
    assert needed == sum(t.nbytes for t in weights(model_dir).values())
    for name, given, free, streams in [
        ("asked", ["--stream"], 1 << 40, True),
        ("resumed", ["--resume"], 1 << 40, True),
        ("short", [], int(1.9 * needed), True),
        ("ample", [], int(2.1 * needed), False),
        ("not", ["--no-stream"], 1, False),
    ]:
        monkeypatch.setattr(pruning, "memory_free", lambda free=free: free)
        out = tmp_path / name
        assert run(*common, "--out", out, *given).code == 0
        assert (out in calls) == streams
        assert all(t.equal(weights(pruned_dir)[n]) for n, t in weights(out).items())


def test_the_method_where_none_is_asked_for(
    run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def chosen(name: str, *given: object) -> str:
        out = tmp_path / name
        done = run("prune", model_dir, "--out", out, "--calibration", text, *SMALL, *given)
        assert (done.code, done.err) == (0, "")
        manifest = load_manifest(out)
        assert manifest is not None
        said = manifest.recipe["notes"]["method"]
        assert f": {said}, 4 x 16 calibration tokens" in done.out
        assert manifest.recipe["passes"] == method(said, 0.2).to_dict()["passes"]
        return said

    assert chosen("whole") == "slimgraph"
    assert chosen("streamed", "--stream") == "slimllm"
    monkeypatch.setattr(pipeline, "can_generate", lambda _: False)
    assert chosen("mute") == "slimllm"
    assert chosen("asked", "--method", "wanda") == "wanda"


def test_options_that_streaming_cannot_do_are_refused(
    run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path
) -> None:
    common = ["prune", model_dir, "--out", tmp_path / "out", "--calibration", text, *SMALL]
    refused(run(*common, "--resume", "--no-stream"), "--resume and --no-stream")
    refused(run(*common, "--stream", "--verify"), "--verify needs the weights in memory")


def test_what_the_compiler_did(
    run: Callable[..., Run], model_dir: Path, pruned_dir: Path, text: Path, tmp_path: Path
) -> None:
    bisection, overlay, page = tmp_path / "bisect.json", tmp_path / "nodes.json", tmp_path / "report.html"
    options = ["--text", text, "--seq-len", 16, "--tokens", 64, "--json", bisection, "--node-data", overlay]
    done = run("bisect", model_dir, pruned_dir, *options)
    assert (done.code, done.err) == (0, "")
    assert "unexplained  nothing" in done.out
    assert json.loads(bisection.read_text())["faults"] == []
    assert json.loads(overlay.read_text())["graph"]["results"]

    done = run("diff", model_dir, pruned_dir, "--json", "-", "--markdown", tmp_path / "diff.md")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["groups"]
    assert "## Layers" in (tmp_path / "diff.md").read_text()

    done = run("report", pruned_dir, "--html", page, "--bisect", bisection)
    assert (done.code, done.err) == (0, "")
    assert "What restoring one layer would gain" in page.read_text(encoding="utf-8")

    done = run("inspect", model_dir, "--dot", tmp_path / "g.dot", "--graphml", tmp_path / "g.xml", "--json", "-")
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "g.dot").read_text().startswith("graph slimgraph {")


def test_wrong_use_of_what_looks_at_models(run: Callable[..., Run], model_dir: Path, tmp_path: Path) -> None:
    done = run("diff", model_dir, model_dir, model_dir)
    assert done.code == 2
    assert "found 3 models" in done.err
    done = run("report", model_dir, "--html", tmp_path / "out.html")
    assert done.code == 1
    assert "was not pruned by slimgraph" in done.err
    assert not (tmp_path / "out.html").exists()


def test_prune_says_what_it_chose(run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    done = run("prune", model_dir, "--out", out, "--ratio", 0.2, "--calibration", text, *PUBLISHED, "--plan", plan)
    assert (done.code, done.err) == (0, "")
    for word in ("heads", "kv groups", "channels", "unit ratio", "similarity", " -> ", "removed", "sweep", "logits"):
        assert word in done.out
    assert str(out) in done.out
    before = sum(p.numel() for p in slimgraph.load(model_dir).parameters())
    after = sum(p.numel() for p in slimgraph.load(out).parameters())
    assert f"{before:,} -> {after:,}: {1 - after / before:.2%} removed" in done.out
    assert slimgraph.Plan.from_json(plan.read_text()).cuts


def test_a_checkpoint_carries_its_recipe(
    run: Callable[..., Run], pruned_dir: Path, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    manifest = load_manifest(pruned_dir)
    assert manifest is not None
    assert manifest.recipe["notes"] == {
        "calibration": str(text),
        "samples": 4,
        "seq_len": 16,
        "seed": 0,
        "dtype": "float32",
        "model": str(model_dir),
        "method": "slimllm",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(manifest.recipe))
    again = run("prune", model_dir, "--out", tmp_path / "again", "--recipe", recipe, "--calibration", text, *SMALL)
    assert again.code == 0
    one, other = slimgraph.load(pruned_dir).state_dict(), slimgraph.load(tmp_path / "again").state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "random"])
def test_other_methods(run: Callable[..., Run], model_dir: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    done = run("prune", model_dir, "--out", out, "--method", name, "--ratio", 0.1, *SMALL, "--heads", "kv")
    assert (done.code, done.err) == (0, "")
    assert slimgraph.load(out) is not None


def test_no_recovery_adds_no_bias(run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path) -> None:
    done = run("prune", model_dir, "--out", tmp_path / "out", "--no-recovery", "--calibration", text, *SMALL)
    assert done.code == 0
    assert not [name for name in slimgraph.load(tmp_path / "out").state_dict() if name.endswith("bias")]


def test_a_pruned_model_is_pruned_again(run: Callable[..., Run], pruned_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("prune", pruned_dir, "--out", out, "--ratio", 0.1, "--calibration", text, *SMALL)
    assert (done.code, done.err) == (0, "")
    counts = [sum(p.numel() for p in slimgraph.load(path).parameters()) for path in (pruned_dir, out)]
    assert counts[1] < counts[0]


def test_a_checkpoint_keeps_its_dtype(run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path) -> None:
    load_model(model_dir, dtype=torch.bfloat16).save_pretrained(tmp_path / "narrow")
    load_tokenizer(model_dir).save_pretrained(tmp_path / "narrow")
    common = ["prune", tmp_path / "narrow", "--out", tmp_path / "out", "--force", "--calibration", text, *PUBLISHED]
    for more, dtype in ((["--dtype", "float32"], torch.float32), (["--stream"], torch.bfloat16), ([], torch.bfloat16)):
        done = run(*common, *more)
        assert f"checkpoint   {tmp_path / 'out'}, {str(dtype).removeprefix('torch.')}\n" in done.out
        assert "seed 0, float32 on cpu" in done.out
        assert {p.dtype for p in slimgraph.load(tmp_path / "out").parameters()} == {dtype}
    assert run("verify", tmp_path / "out", "--against", tmp_path / "narrow").code == 0


def test_force_replaces_a_checkpoint(
    run: Callable[..., Run], pruned_dir: Path, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(pruned_dir, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    common = ["prune", model_dir, "--out", out, "--ratio", 0.1, "--calibration", text, *SMALL]
    assert run(*common).code == 1
    assert (out / "model.safetensors").read_bytes() == before
    assert run(*common, "--force").code == 0
    assert (out / "model.safetensors").read_bytes() != before


def test_eval(run: Callable[..., Run], pruned_dir: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run("eval", pruned_dir, "--text", text, "--seq-len", 16, "--json", file)
    assert (done.code, done.err) == (0, "")
    found = json.loads(file.read_text())
    measured = found["perplexity"][str(text)]
    assert f"perplexity {measured['value']:.3f}" in done.out
    assert measured["windows"] * 15 == measured["tokens"]
    to_stdout = run("eval", pruned_dir, "--text", text, "--seq-len", 16, "--tokens", 64, "--json", "-")
    assert json.loads(to_stdout.out)["perplexity"][str(text)]["windows"] == 4


def test_eval_on_several_texts_with_a_start_token(
    run: Callable[..., Run],
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: Any,
    text: Path,
    tmp_path: Path,
) -> None:
    starting = copy.deepcopy(tiny_tokenizer)
    starting.add_special_tokens({"bos_token": "the"})
    tiny_llama().save_pretrained(tmp_path / "model")
    starting.save_pretrained(tmp_path / "model")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[5:])
    common = ["eval", tmp_path / "model", "--text", text, "--text", other, "--seq-len", 16, "--json", "-"]
    never, always = (json.loads(run(*common, "--bos", bos).out) for bos in ("never", "always"))
    assert list(never["perplexity"]) == list(always["perplexity"]) == [str(text), str(other)]
    assert (never["start"], always["start"]) == ([], [starting.bos_token_id])
    assert never["perplexity"][str(text)]["value"] != always["perplexity"][str(text)]["value"]
    refused(run(*common, "--bos", "perhaps"), "'perhaps'", "auto, always, never")
    compared = run("compare", tmp_path / "model", *common[2:4], "--seq-len", 16, "--json", "-", "--bos", "always")
    (entry,) = json.loads(compared.out)["entries"]
    assert entry["perplexities"][text.stem]["value"] == always["perplexity"][str(text)]["value"]


def test_eval_needs_something_to_measure(run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path) -> None:
    refused(run("eval", model_dir), "--text", "--tasks")
    refused(run("eval", model_dir, "--tasks", "boolq", "--include-path", tmp_path / "none"), "does not exist")
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\noutput_type: multiple_choice\n")
    refused(
        run("eval", model_dir, "--text", text, "--tasks", "far", "--include-path", tmp_path), "far", "hub", "offline"
    )


def test_inspect(run: Callable[..., Run], model_dir: Path, pruned_dir: Path) -> None:
    done = run("inspect", model_dir)
    assert (done.code, done.err) == (0, "")
    for expected in (
        "Layers 0-1 (model.layers.*)",
        "2 kv groups × 2 heads × 8",
        "48 channels",
        "site: self_attn.o_proj.weight[1]",
        "made by: mlp.gate_proj.weight[0], mlp.up_proj.weight[0]",
        "4 positions: self_attn.q_proj.weight[0], self_attn.k_proj.weight[0]; its halves are tied",
        "32 positions, the same ones",
        "rows are looked up by token",
    ):
        assert expected in done.out
    pruned = run("inspect", pruned_dir)
    assert pruned.code == 0
    assert "48 channels" not in pruned.out


def test_inspect_reads_no_weights(run: Callable[..., Run], model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        shutil.copy(model_dir / name, tmp_path)
    done = run("inspect", tmp_path, "--json", "-")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["layers"] == ["model.layers.0", "model.layers.1"]
    assert {site["kind"] for site in found["sites"]} == {"heads", "channels"}


def test_inspect_in_python(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    found = slimgraph.inspect(tiny_llama(tie_word_embeddings=True, num_hidden_layers=3))
    assert "in 3 layers (model.layers.0 to model.layers.2)" in repr(found)
    assert "model.embed_tokens.weight is read in 2 places" in repr(found)
    assert "<table>" in found._repr_html_()
    assert found.to_dict() == found.structure.to_dict()


def test_prune_takes_text(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast, text: Path
) -> None:
    options = {"ratio": 0.2, "samples": 4, "seq_len": 16, "tokenizer": tiny_tokenizer}
    content = text.read_text()
    results = [slimgraph.prune(tiny_llama(), each, **options) for each in (text, str(text), content, [content])]
    assert len({str(result.plan.to_dict()) for result in results}) == 1
    assert [result.recipe["notes"]["calibration"] for result in results] == [str(text), str(text), "text", "text"]
    with pytest.raises(slimgraph.SlimgraphError, match="no tokenizer"):
        slimgraph.prune(tiny_llama(), content)


def test_the_method_of_a_model_that_cannot_write_is_the_published_one(
    tiny_llama: Callable[..., LlamaForCausalLM],
) -> None:
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    model, mute = tiny_llama(), tiny_llama()
    mute.generate = None
    for each, name in ((model, "slimgraph"), (mute, "slimllm")):
        recipe = slimgraph.prune(each, ids).recipe
        assert (recipe["notes"]["method"], recipe["passes"]) == (name, method(name, 0.2).to_dict()["passes"])
    assert "method" not in slimgraph.prune(model, ids, recipe=method("slimllm", 0.2)).recipe["notes"]


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (0, 64)])
def test_prune_refuses_unknown_tokens(tiny_llama: Callable[..., LlamaForCausalLM], low: int, high: int) -> None:
    with pytest.raises(slimgraph.SlimgraphError, match="expected 0 to 63"):
        slimgraph.prune(tiny_llama(), torch.tensor([[low, high]]))


def test_the_demo(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_SEQ_LEN", 32)
    out = tmp_path / "out"
    demo.run(SILENT, out=out, model=str(model_dir), samples=4, tokens=256)
    seen = capsys.readouterr().out
    for expected in (
        "without recovery",
        "with recovery",
        "perplexity",
        "sweep",
        f"checkpoint   {out}",
        "another process",
    ):
        assert expected in seen
    assert slimgraph.load(out) is not None


def test_the_demo_reads_text_as_the_tokenizer_begins_it(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="\n $A", special_tokens=[("\n", 1)])
    tokenizer.save_pretrained(directory)
    starts: list[list[int]] = []
    firsts: list[int] = []

    def measure(*given: Any, start: list[int], **options: Any) -> Any:
        starts.append(start)
        return perplexity(*given, start=start, **options)

    def prune(model: Any, ids: torch.Tensor, *given: Any, **options: Any) -> Any:
        firsts.extend(ids[:, 0].tolist())
        return slimgraph.prune(model, ids, *given, **options)

    monkeypatch.setattr(demo, "_SEQ_LEN", 32)
    monkeypatch.setattr(demo, "perplexity", measure)
    monkeypatch.setattr(demo, "prune", prune)
    demo.run(SILENT, out=tmp_path / "out", model=str(directory), samples=4, tokens=256)
    assert "another process" in capsys.readouterr().out
    assert starts == [[1]] * 3
    assert firsts == [1] * 8


def test_the_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "slimgraph", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("slimgraph ")


# ---- bad input ----


def refused(done: Run, *words: str, code: int = 1) -> None:
    """One line on standard error, nothing else anywhere."""
    assert done.code == code
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.startswith("slimgraph: error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ratio", "1.5"], ["ratio is 1.5", "0 <= ratio < 1"]),
        (["--ratio", "-0.1"], ["ratio is -0.1"]),
        (["--ratio", "nan"], ["ratio is nan"]),
        (["--dtype", "int8"], ["--dtype is 'int8'", "float32"]),
        (["--device", "abacus"], ["--device is 'abacus'", "cpu"]),
        (["--device", "meta"], ["no values"]),
        (["--method", "guess"], ["'guess'", "slimllm, magnitude, wanda, flap, taylor, random"]),
        (["--heads", "odd"], ["'odd'", "balanced"]),
        (["--calibration", "nowhere.txt"], ["nowhere.txt", "does not exist"]),
        (["--samples", "100000"], ["too short", "needed for 100000 samples"]),
        (["--seq-len", "128", "--samples", "1"], ["longer than the 64 positions"]),
        (["--recipe", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--plan", "/nowhere/plan.json"], ["--plan", "/nowhere"]),
    ],
)
def test_prune_refuses(
    run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    defaults = {"--samples": "4", "--seq-len": "16", "--calibration": str(text)}
    defaults |= dict(zip(options[::2], options[1::2], strict=True))
    out = tmp_path / "new" / "out"
    refused(run("prune", model_dir, "--out", out, *(x for pair in defaults.items() for x in pair)), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["prune", "compare"])
def test_every_calibration_text_is_read(
    run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path, command: str
) -> None:
    more = ["--out", tmp_path / "out"] if command == "prune" else ["--ratios", "0.1", "--text", text]
    given = ["--calibration", text, "--calibration", "nowhere.txt", "--samples", "4", "--seq-len", "16"]
    refused(run(command, model_dir, *more, *given), "nowhere.txt", "does not exist")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("passes: [{polish: {}}]", ["'polish'", "magnitude"]),
        ("passes: [{magnitude: {power: 3}}]", ["magnitude", "power"]),
        ("passes: [{uniform_allocation: {ratio: lots}}]", ["uniform_allocation", "ratio", "lots"]),
        ("passes: 3", ["list `passes`"]),
        ("stages: []", ["list `passes`"]),
        ("passes: [", ["not YAML"]),
        ("passes: [sweep]", ["allocation pass before it"]),
    ],
)
def test_recipes_that_are_refused(
    run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path, recipe: str, words: list[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    out = tmp_path / "out"
    refused(run("prune", model_dir, "--out", out, "--recipe", file, "--calibration", text, *SMALL), *words)
    assert not out.exists()


def test_a_recipe_and_a_ratio(run: Callable[..., Run], model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(method("magnitude", 0.2).to_yaml())
    done = run("prune", model_dir, "--out", tmp_path / "out", "--recipe", file, "--ratio", 0.3)
    refused(done, "--ratio", "--recipe", "leave one out")


def test_the_largest_reachable_ratio_is_named(
    run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path
) -> None:
    common = ["prune", model_dir, "--out", tmp_path / "out", "--calibration", text, *SMALL]
    done = run(*common, "--ratio", 0.9)
    refused(done, "0.9 cannot be reached", "at most")
    assert not (tmp_path / "out").exists()
    most = done.err.partition("Ask for at most ")[2].split(",")[0]
    assert run(*common, "--ratio", most).code == 0


@pytest.mark.parametrize("content", ["", "   \n"])
def test_empty_calibration(run: Callable[..., Run], model_dir: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(content)
    refused(run("prune", model_dir, "--out", tmp_path / "out", "--calibration", file), "no text")
    refused(run("eval", model_dir, "--text", file), "no text")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_text_that_is_too_short(run: Callable[..., Run], model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("the cat sits")
    refused(run("eval", model_dir, "--text", file, "--seq-len", 16), "3 tokens found, 16 needed")


def test_a_model_that_is_not_there(run: Callable[..., Run], tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "nobody/nothing"):
        refused(run("prune", name, "--out", tmp_path / "out"), str(name))
        refused(run("inspect", name), str(name))
        refused(run("eval", name, "--text", "x.txt"), str(name))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_causal(
    run: Callable[..., Run], tiny_tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    model = tmp_path / "bert"
    config = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    refused(
        run("prune", model, "--out", tmp_path / "out", "--calibration", text, *SMALL), "not a causal language model"
    )
    refused(run("inspect", model), "not a causal language model")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(
    run: Callable[..., Run],
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    words = ["layers.1.mlp.up_proj.weight", "NaN or infinite"]
    refused(
        run("prune", tmp_path / "model", "--out", tmp_path / "out", "--calibration", text, *SMALL),
        *words,
    )
    refused(run("eval", tmp_path / "model", "--text", text, "--seq-len", 16), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["slimllm", "magnitude"])
def test_activations_that_are_not_finite(
    run: Callable[..., Run],
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    name: str,
) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e30)
    model.model.layers[1].mlp.gate_proj.weight.data.mul_(1e30)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    common = ["prune", tmp_path / "model", "--out", tmp_path / "out", "--calibration", text, *SMALL]
    refused(run(*common, "--method", name), "layers.1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "config", "missing"])
def test_a_damaged_checkpoint(
    run: Callable[..., Run], pruned_dir: Path, text: Path, tmp_path: Path, damage: str
) -> None:
    model = shutil.copytree(pruned_dir, tmp_path / "model")
    weights = model / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing":
        weights.unlink()
    else:
        (model / "config.json").write_text("{")
    refused(run("eval", model, "--text", text, "--seq-len", 16), str(model))
    refused(run("prune", model, "--out", tmp_path / "out", "--calibration", text, *SMALL), str(model))
    assert not (tmp_path / "out").exists()


def test_the_place_is_checked_before_the_work(run: Callable[..., Run], tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    refused(run("prune", "nobody/nothing", "--out", full), "not empty")  # the model is not even looked for
    refused(run("prune", "nobody/nothing", "--out", full, "--force"), "only a checkpoint is ever replaced")
    refused(run("prune", "nobody/nothing", "--out", full / "notes.txt"), "is a file")
    refused(run("prune", "nobody/nothing", "--out", full / "notes.txt" / "deeper"), "is a file")
    refused(run("demo", "--model", "nobody/nothing", "--out", full), "not empty")
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_a_module_that_cannot_be_pruned(
    run: Callable[..., Run], model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise slimgraph.errors.ModelError("LlamaForCausalLM: does not agree with the pruned graph")

    monkeypatch.setattr("slimgraph.pipeline.prune_module", fail)
    common = ["prune", model_dir, "--out", tmp_path / "out", "--calibration", text, *SMALL]
    refused(run(*common), "does not agree", "nothing was written")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trim"], ["trim"]),
        (["prune", "model"], ["--out"]),
        (["prune", "model", "--out", "x", "--ratios", "1"], ["--ratios"]),
        (["prune", "model", "--out", "x", "--samples", "0"], ["--samples"]),
        (["eval", "model", "--text", "x", "--seq-len", "1"], ["--seq-len"]),
    ],
)
def test_wrong_usage(run: Callable[..., Run], arguments: list[str], words: list[str]) -> None:
    refused(run(*arguments), *words, code=2)
