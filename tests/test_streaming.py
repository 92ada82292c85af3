"""Streamed runs: the same checkpoint as in memory, stopped and gone on with, and from several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import VOCABULARY, decoder, logits, make, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slimgraph
from slimgraph import distributed
from slimgraph.capacity import memory_free
from slimgraph.errors import CheckpointError, ModelError, PlanError
from slimgraph.execute import Parking, run
from slimgraph.passes import ApplyPlan, Sweep
from slimgraph.pretrained import load_model, load_skeleton
from slimgraph.recipe import Recipe, method
from slimgraph.shards import NOTES, Shards, run_folder
from slimgraph.standins import StandIns
from slimgraph.store import Store
from slimgraph.streaming import _fingerprint, prune_checkpoint
from slimgraph.sweep import layer_similarity
from slimgraph.trace import tensor_at

IDS = tokens(6, 9, seed=3)
RECIPE = method("slimllm", 0.2, round_to=4)


def saved(tmp_path: Path, family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Path:
    directory = tmp_path / "dense"
    make(family, **changes).to(dtype).save_pretrained(directory, max_shard_size="20KB")
    return directory


def streamed(source: Path, out: Path, **options: Any) -> slimgraph.Result:
    settings = {"recipe": RECIPE, "dtype": torch.float64, "batch": 4, **options}
    return prune_checkpoint(source, out, IDS, **settings)


def files_of(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(directory.iterdir())}


def weights_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for f in directory.glob("*.safetensors") for name, t in load_file(f).items()}


# -- what is refused before anything is read or written ----------------------------------------------------------------


TWICE = Recipe((*RECIPE.passes[:-1], *RECIPE.passes[-3:]))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (TWICE, r"^a streamed model can be cut by one pass only, found sweep and sweep: "),
        (
            Recipe((ApplyPlan({}), *RECIPE.passes)),
            r"^a streamed model can be cut by one pass only, found apply_plan and sweep: ",
        ),
        ("slimgraph", r"^self_calibration: a model whose weights are streamed cannot write .* the method slimllm$"),
    ],
    ids=["two sweeps", "a plan and a sweep", "samples of its own"],
)
def test_recipes_that_need_the_weights_again(recipe: Recipe | str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        prune_checkpoint(tmp_path / "nothing", tmp_path / "out", IDS, recipe=recipe)
    assert not any(tmp_path.iterdir())


# -- the same as in memory --------------------------------------------------------------------------------------------

MODELS: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("llama", torch.float64, {}),
    ("llama", torch.float32, {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    ("llama", torch.bfloat16, {"attention_bias": True}),
    ("gpt2", torch.float64, {}),
    ("gpt_neox", torch.float32, {}),
    ("phi3", torch.float64, {}),
]


@pytest.mark.parametrize(("family", "dtype", "changes"), MODELS, ids=[f"{m[0]}-{m[1]}" for m in MODELS])
def test_streaming_equals_pruning_in_memory(
    family: str, dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path
) -> None:
    source, out = saved(tmp_path, family, dtype, **changes), tmp_path / "out"
    here = slimgraph.prune(slimgraph.load(source), IDS, recipe=RECIPE, batch=4)
    there = streamed(source, out, dtype=dtype)
    assert there.plan == here.plan
    assert there.plan.cuts
    assert there.parameters_after == here.parameters_after
    assert there.model is None
    loaded = slimgraph.load(out)
    expected = here.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert tensor.equal(expected[name]), name
    assert logits(loaded, IDS).equal(logits(here.model, IDS))
    assert loaded.config.quantization_config.manifest.plan == here.plan.to_dict()


def test_weights_are_written_in_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, here, there = saved(tmp_path, num_hidden_layers=4), tmp_path / "here", tmp_path / "there"
    result = slimgraph.prune(slimgraph.load(source), IDS, recipe=RECIPE, batch=4)
    result.save(here, dtype=torch.bfloat16)
    stop(monkeypatch, source, there, save_dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="another model, recipe, calibration text, dtype"):
        streamed(source, there, resume=True)
    streamed(source, there, resume=True, save_dtype=torch.bfloat16)
    found, expected = weights_of(there), weights_of(here)
    assert found.keys() == expected.keys()
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert all(found[name].equal(expected[name]) for name in expected)
    assert json.loads((there / "config.json").read_text()) == json.loads((here / "config.json").read_text())
    assert next(slimgraph.load(there).parameters()).dtype == torch.bfloat16


def test_a_pruned_checkpoint_is_streamed_again(tmp_path: Path) -> None:
    source, once, twice = saved(tmp_path, num_hidden_layers=3), tmp_path / "once", tmp_path / "twice"
    streamed(source, once)
    streamed(once, twice, recipe=method("magnitude", 0.2, round_to=1))
    here = slimgraph.prune(slimgraph.load(once), IDS, recipe=method("magnitude", 0.2, round_to=1), batch=4)
    assert logits(slimgraph.load(twice), IDS).equal(logits(here.model, IDS))


@pytest.mark.parametrize("recovery", ["no_recovery", "bias_only"])
@pytest.mark.parametrize("name", ["wanda", "random"])
def test_other_methods_stream_as_well(name: str, recovery: str, tmp_path: Path) -> None:
    source, recipe = saved(tmp_path), method(name, 0.3, recovery=recovery, round_to=1)
    streamed(source, tmp_path / "out", recipe=recipe)
    here = slimgraph.prune(slimgraph.load(source), IDS, recipe=recipe, batch=4)
    assert logits(slimgraph.load(tmp_path / "out"), IDS).equal(logits(here.model, IDS))


def test_few_weights_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, num_hidden_layers=6)
    alive: list[tuple[int, weakref.ref[Tensor]]] = []
    most = [0]
    read = Store._read

    def watched(self: Store, name: str) -> Tensor:
        tensor = read(self, name)
        alive.append((tensor.numel(), weakref.ref(tensor)))
        most[0] = max(most[0], sum(n for n, ref in alive if ref() is not None))
        return tensor

    monkeypatch.setattr(Store, "_read", watched)
    result = streamed(source, tmp_path / "out")
    embedding = 2 * VOCABULARY * 24
    of_layers = result.parameters_before - embedding
    assert most[0] < embedding + 0.5 * of_layers  # two or three of six layers at a time


# -- stopped and gone on with -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an error that anything may catch."""


def stop(
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    out: Path,
    place: str = "after",
    layer: int = 0,
    *,
    killed: bool = True,
    **options: Any,
) -> None:
    """A run that ends before, within or after the end of a layer; one that is killed cleans up nothing."""
    with monkeypatch.context() as patched:
        end_at(patched, place, layer)
        if killed:
            patched.setattr(Shards, "__exit__", lambda *_: None)
        with pytest.raises(Killed):
            streamed(source, out, **options)


def end_at(monkeypatch: pytest.MonkeyPatch, place: str, layer: int) -> None:
    original = {"layer_done": Shards.layer_done, "save": Parking.save, "finish": Shards.finish}

    def layer_done(self: Shards, index: int, parking: Parking) -> None:
        if place == "before" and index == layer:
            raise Killed
        original["layer_done"](self, index, parking)
        if place == "after" and index == layer:
            raise Killed

    def save(self: Parking, folder: Path) -> None:
        original["save"](self, folder)
        if place == "within" and folder.parent.name == f"{layer:05d}":
            raise Killed

    def finish(self: Shards, *arguments: Any) -> None:
        original["finish"](self, *arguments)
        if place == "end":
            raise Killed

    monkeypatch.setattr(Shards, "layer_done", layer_done)
    monkeypatch.setattr(Parking, "save", save)
    monkeypatch.setattr(Shards, "finish", finish)


@pytest.mark.parametrize(
    ("place", "layer"),
    [("before", 0), ("within", 0), ("after", 0), ("before", 2), ("within", 2), ("after", 3), ("end", 0)],
)
def test_a_stopped_run_goes_on_to_the_same_files(
    place: str, layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path, num_hidden_layers=4, attention_bias=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = streamed(source, whole)
    stop(monkeypatch, source, parts, place, layer)
    assert not parts.exists()
    assert run_folder(parts).exists()
    found = streamed(source, parts, resume=True)
    assert found.plan == expected.plan
    assert found.similarity == expected.similarity
    assert files_of(parts) == files_of(whole)
    assert not run_folder(parts).exists()


def test_going_on_does_not_repeat_finished_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, num_hidden_layers=4)
    stop(monkeypatch, source, tmp_path / "out", layer=1)
    reads: list[str] = []
    read = Store._read
    monkeypatch.setattr(Store, "_read", lambda self, name: reads.append(name) or read(self, name))
    streamed(source, tmp_path / "out", resume=True)
    assert not [n for n in reads if n.startswith(("model.layers.0.", "model.layers.1."))]


def test_going_on_where_nothing_was_begun_is_a_new_run(tmp_path: Path) -> None:
    source = saved(tmp_path)
    streamed(source, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_stopped_run_is_neither_thrown_away_nor_mixed_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = saved(tmp_path), tmp_path / "out"
    stop(monkeypatch, source, out)
    with pytest.raises(CheckpointError, match=r"left by a run that was stopped: go on with it \(resume\), or delete"):
        streamed(source, out)
    with pytest.raises(CheckpointError, match="another model, recipe, calibration text, dtype"):
        streamed(source, out, resume=True, recipe=method("slimllm", 0.3, round_to=4))
    with pytest.raises(CheckpointError, match="another model, recipe, calibration text, dtype"):
        prune_checkpoint(source, out, IDS[:4], recipe=RECIPE, dtype=torch.float64, batch=4, resume=True)
    (run_folder(out) / NOTES).write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
        streamed(source, out, resume=True)


def test_a_run_of_which_nothing_can_be_gone_on_from_leaves_nothing(tmp_path: Path) -> None:
    """So that a wrong command does not stand in the way of the right one."""
    source, out = saved(tmp_path), tmp_path / "out"
    with pytest.raises(PlanError, match="reach"):
        streamed(source, out, recipe=method("slimllm", 0.97))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dense"]
    streamed(source, out)


@pytest.mark.parametrize(("place", "kept"), [("before", False), ("after", True)])
def test_an_error_leaves_what_can_be_gone_on_from(
    place: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = saved(tmp_path), tmp_path / "out"
    stop(monkeypatch, source, out, place, killed=False)
    assert run_folder(out).exists() == kept
    streamed(source, out, resume=True)


def test_a_stopped_run_is_not_gone_on_with_in_other_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = saved(tmp_path), tmp_path / "out"
    stop(monkeypatch, source, out)
    with pytest.raises(CheckpointError, match="samples at once"):
        streamed(source, out, resume=True, batch=2)
    streamed(source, out, resume=True)


def test_how_fast_the_machine_is_counts_only_where_a_recipe_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path)

    def fingerprints(recipe: Recipe) -> set[str]:
        found = set()
        for fast in (False, True):
            monkeypatch.setattr("slimgraph.streaming.faster_in", lambda *_, fast=fast: fast)
            found.add(_fingerprint(source, recipe, IDS, 4, [torch.float32], torch.device("cpu")))
        return found

    assert len(fingerprints(RECIPE)) == 1
    assert len(fingerprints(Recipe((*RECIPE.passes[:-2], Sweep(dtype="bfloat16"))))) == 2


def test_a_run_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = saved(tmp_path), tmp_path / "out"
    streamed(source, out)
    before = files_of(out)
    monkeypatch.setattr("slimgraph.shards.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CheckpointError, match=r"disk full.*untouched.*resume"):
        streamed(source, out, force=True)
    assert files_of(out) == before
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        streamed(source, out)


# -- several processes ------------------------------------------------------------------------------------------------


WRITTEN = {
    "passes": [
        {"self_calibration": {"samples": 5, "dtype": None}},
        *method("slimllm", 0.2, round_to=1).to_dict()["passes"],
    ]
}


def test_two_processes_decide_as_one(tmp_path: Path) -> None:
    source, one, two = saved(tmp_path, dtype=torch.float32), tmp_path / "one", tmp_path / "two"
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(IDS.tolist()))
    here = streamed(source, one, dtype=torch.float32)
    program = tmp_path / "prune.py"
    program.write_text(
        "import json, sys, torch\n"
        "from pathlib import Path\n"
        "from slimgraph import distributed, prune\n"
        "from slimgraph.pretrained import load_model\n"
        "from slimgraph.recipe import Recipe, method\n"
        "from slimgraph.streaming import prune_checkpoint\n"
        "source, out, ids = sys.argv[1:]\n"
        "with distributed.joined(torch.device('cpu')):\n"
        "    prune_checkpoint(source, out, json.load(open(ids)), recipe=method('slimllm', 0.2, round_to=4),\n"
        "                     dtype=torch.float32, batch=2)\n"
        "    assert distributed.world() == 2\n"
        "    for name in ('flap', 'taylor', 'written'):\n"
        "        model = load_model(source, dtype=torch.float64)\n"
        f"        recipe = Recipe.from_dict({WRITTEN}) if name == 'written' else method(name, 0.2, round_to=1)\n"
        "        found = prune(model, json.load(open(ids)), recipe=recipe).plan\n"
        "        Path(f'{out}-{name}-{distributed.rank()}').write_text(found.to_json())\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, program, source, two, ids]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = weights_of(one), weights_of(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6)
    assert slimgraph.load_manifest(two).plan == here.plan.to_dict()
    for name in ("flap", "taylor", "written"):
        recipe = Recipe.from_dict(WRITTEN) if name == "written" else method(name, 0.2, round_to=1)
        alone = slimgraph.prune(load_model(source, dtype=torch.float64), IDS, recipe=recipe).plan
        assert [Path(f"{two}-{name}-{rank}").read_text() for rank in (0, 1)] == [alone.to_json()] * 2


def test_a_single_process_is_the_identity() -> None:
    assert distributed.combine(IDS) is IDS
    assert distributed.share(IDS) is not None
    assert distributed.share(IDS).equal(IDS)
    assert (distributed.world(), distributed.rank(), distributed.is_first()) == (1, 0, True)


# -- parked values ----------------------------------------------------------------------------------------------------


def test_values_that_do_not_fit_are_parked_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = slimgraph.execute._write
    monkeypatch.setattr("slimgraph.execute._write", lambda t, file: written.append(file) or write(t, file))
    made = decoder()
    layer_similarity(made.structure, IDS.split(2))
    assert not written
    first, _ = made.structure.boundaries()[1]  # leaves the first layer, read in the second
    seen: dict[int, list[Tensor]] = {0: [], 1 << 30: []}
    for room, values in seen.items():
        cuts: dict[str, Callable[[Parking], None]] = {
            first: lambda parking, values=values: values.extend(parking.all(first)),
            made.structure.boundaries()[1][1]: lambda parking: None,
        }
        run(made.graph, IDS.split(2), cuts=cuts, room=room)
    assert written
    assert all(not file.exists() for file in written)
    assert len(seen[0]) == 3
    assert all(a.equal(b) for a, b in zip(seen[0], seen[1 << 30], strict=True))


def test_what_is_parked_is_bounded_by_the_memory_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device | None] = []
    monkeypatch.setattr("slimgraph.execute.memory_free", lambda device: asked.append(device) or 4 * 100)
    with Parking(3) as parking:
        for i, size in enumerate((60, 40, 1)):
            parking.put(i, {"n": 7, "x": torch.zeros(size, dtype=torch.uint8)})
            assert len(parking._files) == (1 if i == 2 else 0)
    assert asked == [torch.device("cpu")]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11, 22))
    assert memory_free(torch.device("cuda", 0)) == 11
    assert memory_free(torch.device("cpu")) > 11


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_parked_values_survive_saving(room: int, tmp_path: Path) -> None:
    values = {"a": torch.randn(2, 3, dtype=torch.bfloat16), "b": torch.arange(4), "n": 7, "x": 0.1, "flag": True}
    parking = Parking(2, room)
    for i in range(2):
        parking.put(i, {**values, "i": i})
    parking.save(tmp_path)
    with Parking.load(tmp_path, torch.device("cpu"), room) as loaded, parking:
        for i in range(2):
            found = loaded.take(i)
            assert found.keys() == {*values, "i"}
            assert found["a"].equal(values["a"])
            assert found["b"].equal(values["b"])
            assert (found["n"], found["x"], found["flag"], found["i"]) == (7, 0.1, True, i)
            assert type(found["n"]) is int
            assert type(found["flag"]) is bool


# -- stores and stand-ins ---------------------------------------------------------------------------------------------


def test_a_store_gives_every_tensor_by_the_models_names(tmp_path: Path) -> None:
    source = saved(tmp_path, tie_word_embeddings=True)
    real = slimgraph.load(source)
    skeleton, _ = load_skeleton(source, dtype=torch.float64)
    store = Store(source, skeleton, torch.float64, torch.device("cpu"))
    store.expect(store.names)
    for name in [*store.names, "model.rotary_emb.inv_freq"]:
        assert store(name).equal(tensor_at(real, name)), name
        assert store(name).equal(tensor_at(real, name)), name  # and again, no longer read ahead
    assert "lm_head.weight" not in store.names
    assert store("model.norm.weight").dtype == torch.float64
    store.close()
    half = Store(source, skeleton, torch.bfloat16, torch.device("cpu"))
    assert half("model.norm.weight").equal(tensor_at(real, "model.norm.weight").bfloat16())


def test_files_without_the_models_names_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path)
    file = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({f"other.{n}" if n == name else n: t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"hold no tensor '{name}'.*without streaming"):
        streamed(source, tmp_path / "out")
    save_file({n: t[:1] if n == name else t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"tensor '{name}' has shape .* expects"):
        streamed(source, tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_a_name_on_the_hub_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory; weights are streamed from the files"):
        streamed(Path("some/where"), tmp_path / "out")


def test_stand_ins_take_no_memory_and_differ() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
    model[3].weight = model[0].weight
    make_more = StandIns.fill(model, torch.bfloat16)
    assert model[3].weight is model[0].weight
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) < 3 * 2048 * 2048 * 2
    a, b = model[0].weight, model[1].weight
    assert not a.equal(b)
    assert not a[0].equal(a[1])
    assert make_more((3, 5)).shape == (3, 5)
    assert float(a.float().std()) == pytest.approx(0.02, rel=0.1)


def test_a_recipe_without_a_sweep_is_streamed_too(tmp_path: Path) -> None:
    source = saved(tmp_path)
    here = slimgraph.prune(slimgraph.load(source), IDS, recipe=method("magnitude", 0.2, round_to=1), batch=4)
    recipe = Recipe.from_dict({"passes": [{"apply_plan": {"plan": here.plan.to_dict()}}]})
    streamed(source, tmp_path / "out", recipe=recipe)
    assert logits(slimgraph.load(tmp_path / "out"), IDS).equal(logits(here.model, IDS))
