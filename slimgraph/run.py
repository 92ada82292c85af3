"""The whole way by one file: prune, fine-tune, evaluate, compare.

A run file is a recipe with the model, the calibration and what comes afterwards. Everything it makes lies in one
folder: `pruned/` and `finetuned/` are ordinary checkpoints, `evaluation.json`, `comparison.json` and `comparison.md`
what was measured, `run.yaml` the run file itself. A run that was stopped goes on after its last checkpoint; what is
evaluated and compared is measured anew, once where both sections ask for the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from slimgraph.bench import Settings
from slimgraph.compare import Comparison, Contender, Measures, compare
from slimgraph.errors import CheckpointError, ModelError, RecipeError
from slimgraph.evaluation import Evaluation, evaluate
from slimgraph.finetune import FinetuneResult, FinetuneSettings, finetune
from slimgraph.finetune.checkpoints import finished_steps
from slimgraph.finetune.records import read_records
from slimgraph.jsontext import json_text
from slimgraph.order import check_order
from slimgraph.pipeline import Result, prune
from slimgraph.pretrained import load_model, load_tokenizer, own_dtype
from slimgraph.progress import SILENT, Progress
from slimgraph.recipe import Recipe
from slimgraph.tasks import evaluate_tasks, load_tasks
from slimgraph.text import mixed_tokens, read_text

__all__ = ["RunFile", "RunReport", "run"]

_NOTED = "run.yaml"
_MEASURED = {"evaluate": ("evaluation.json",), "compare": ("comparison.json", "comparison.md")}  # section -> its files
_GLANCE = 1000  # characters of a text that are read to see whether it is there

_Bos = Literal["auto", "always", "never"]


class _Section(BaseModel):
    """A part of a run file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationSection(_Section):
    """What the statistics are taken on.

    Attributes:
        text: text file or data set, see `slimgraph.text.read_text`, or a list of them, of which as many windows are
            drawn each; prose of the Python language reference by default.
        samples: windows drawn.
        seq_len: tokens of each.
        seed: of the draw.
        bos: start-of-text token on every window, see `slimgraph.text.start_tokens`.
    """

    text: str | list[str] | None = None
    samples: int = Field(default=32, ge=1)
    seq_len: int = Field(default=128, ge=2)
    seed: int = 0
    bos: _Bos = "auto"

    @property
    def sources(self) -> list[str]:
        """Where texts lie; nowhere by default."""
        return [self.text] if isinstance(self.text, str) else self.text or []


class FinetuneSection(_Section):
    """What is learned afterwards. All other keys are fields of `slimgraph.finetune.FinetuneSettings`.

    Attributes:
        data: records, a file or a data set.
        teacher: learn from the dense model's distribution too.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    data: str
    teacher: bool = False


class MeasureSection(_Section):
    """What is measured of a model; see `slimgraph.evaluation.evaluate`.

    Attributes:
        texts: for perplexities.
        tasks: of lm-eval; `paper` for the seven of the paper.
        include_path: folder with task files.
        limit: examples per task.
        seq_len: tokens of each window.
        tokens: only the first so many of each text.
        bos: start-of-text token on every window and prompt.
        batch: windows or requests at once.
    """

    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = Field(default=None, ge=1)
    seq_len: int = Field(default=128, ge=2)
    tokens: int | None = Field(default=None, ge=2)
    bos: _Bos = "auto"
    batch: int = Field(default=8, ge=1)


class EvaluateSection(MeasureSection):
    """Measures of what the run makes.

    Attributes:
        dense: measure the dense model too.
    """

    dense: bool = False


class CompareSection(MeasureSection):
    """The dense model, what the run makes, and others, in one table.

    Attributes:
        others: further models, directories or names on the hub.
        speed: tokens per second too.
    """

    others: tuple[str, ...] = ()
    speed: bool = False


def _recipe(value: Any) -> Recipe:
    return value if isinstance(value, Recipe) else Recipe.from_dict({"passes": value})


class RunFile(_Section):
    """A run: one model from dense to compared.

    Attributes:
        model: directory of a checkpoint, or a name on the hub.
        out: folder for everything that is made.
        device: where to compute.
        dtype: of the weights, as computed and as saved; computed in float32 and saved in the model's own by default.
        trust_remote_code: let the checkpoint bring its own modeling code.
        calibration, finetune, evaluate, compare: the sections; the last three are left out where not wanted.
        passes: how it is pruned, as in a recipe.
    """

    model: str
    out: str
    device: str = "cpu"
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    trust_remote_code: bool = False
    calibration: CalibrationSection = CalibrationSection()
    passes: Annotated[Recipe, BeforeValidator(_recipe), PlainSerializer(lambda recipe: recipe.to_dict()["passes"])]
    finetune: FinetuneSection | None = None
    evaluate: EvaluateSection | None = None
    compare: CompareSection | None = None

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @classmethod
    def from_dict(cls, data: Any) -> RunFile:
        """Read a run file's content.

        Raises:
            RecipeError: an unknown key, a missing one, or a value that does not fit; the message names it.
        """
        if not isinstance(data, Mapping):
            raise RecipeError("a run file is a mapping with `model`, `out` and `passes`; found something else")
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise RecipeError(f"{where}: {first['msg']} (found {first['input']!r})") from error

    @classmethod
    def from_file(cls, path: Path, changes: Sequence[str] = ()) -> RunFile:
        """Read a YAML file.

        Args:
            path: of the file.
            changes: like `calibration.samples=64`, or `passes.sweep.dtype=null` for the one pass of that name, values
                in YAML; they go before what the file says.

        Raises:
            RecipeError: the file cannot be read, or see `from_dict`.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the run file {path}: {error}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
        try:
            return cls.from_dict(_changed(data, changes))
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    def to_yaml(self) -> str:
        """The run file as a YAML document, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


@dataclass(repr=False)
class RunReport:
    """What a run made.

    Attributes:
        directory: where it lies.
        checkpoints: "pruned" and, where it was fine-tuned, "finetuned" -> directory.
        pruned: the result of pruning; None where it was there already.
        finetuned: what fine-tuning reported; None likewise.
        evaluations: model -> measures.
        comparison: the table, or None.
        kept: steps that were there already.
    """

    directory: Path
    checkpoints: dict[str, Path] = field(default_factory=dict)
    pruned: Result | None = None
    finetuned: FinetuneResult | None = None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    comparison: Comparison | None = None
    kept: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        parts = [f"{step}: there already, kept" for step in self.kept]
        parts += [repr(made) for made in (self.pruned, self.finetuned) if made is not None]
        parts += [f"{name}: {found!r}" for name, found in self.evaluations.items()]
        parts += [repr(self.comparison)] if self.comparison is not None else []
        return "\n\n".join([*parts, f"all of it in {self.directory}"])


def run(plan: RunFile, *, force: bool = False, progress: Progress | None = None) -> RunReport:
    """Do what a run file says. What can be checked is checked before the first step.

    Args:
        plan: the run file.
        force: begin anew where another run has left something; without, a run goes on after its last finished
            checkpoint, also with another `evaluate` or `compare` in its file, or a `finetune` where there was none.
        progress: shows what is going on.

    Raises:
        SlimgraphError: from a step, or because `out` holds something else.
    """
    progress = progress or SILENT
    report = RunReport(Path(plan.out).expanduser())
    dtype = getattr(torch, plan.dtype or "float32")
    saved = None if plan.dtype else own_dtype(plan.model, trust_remote_code=plan.trust_remote_code)
    load = partial(load_model, dtype=dtype, device=plan.device, trust_remote_code=plan.trust_remote_code)
    settings = None if plan.finetune is None else _settings(plan.finetune)
    tokenizer = load_tokenizer(plan.model, trust_remote_code=plan.trust_remote_code)
    _check_inputs(plan)
    goes_on = _check_place(plan, report.directory, force)

    if not (goes_on and _finished(report, "pruned")):
        _prune(plan, report, load, saved, tokenizer, progress)
    if plan.finetune is not None:
        _finetune(plan, plan.finetune, settings, report, (dtype, saved), progress)
    if plan.evaluate is not None:
        _evaluate(plan, plan.evaluate, report, load, tokenizer, progress)
    if plan.compare is not None:
        _compare(plan, plan.compare, report, load, tokenizer, progress)
    return report


# ---- before the first step ----


def _changed(data: Any, changes: Sequence[str]) -> Any:
    for change in changes:
        path, found, value = change.partition("=")
        *outer, last = path.split(".")
        place = data
        for key in outer:
            place = _under(place, key)
        if not found or not isinstance(place, dict):
            raise RecipeError(
                f"the change {change!r} is none; expected KEY=VALUE, like calibration.samples=64, or "
                "passes.NAME.KEY=VALUE for a pass that the file names once"
            )
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"the change {change!r}: {value!r} is not YAML") from error
    return data


def _under(place: Any, key: str) -> Any:
    """What lies under a key; in a list of passes, the fields of the one with that name. None where there is none."""
    if isinstance(place, dict):
        return place.setdefault(key, {})
    if not isinstance(place, list):
        return None
    named = [i for i, each in enumerate(place) if each == key or (isinstance(each, dict) and key in each)]
    if len(named) != 1:
        return None
    (at,) = named
    if not isinstance(place[at], dict) or place[at][key] is None:  # a pass that is named alone
        place[at] = {key: {}}
    return place[at][key]


def _settings(section: FinetuneSection) -> FinetuneSettings:
    return FinetuneSettings.from_dict(section.model_extra or {})


def _check_inputs(plan: RunFile) -> None:
    """Passes, texts, records and tasks are looked at before the work, so that it is not lost to a wrong name."""
    check_order(plan.passes.passes)
    sections = [s for s in (plan.evaluate, plan.compare) if s is not None]
    texts = plan.calibration.sources
    for text in dict.fromkeys([*texts, *(t for s in sections for t in s.texts)]):
        read_text(text, limit=_GLANCE)
    if plan.finetune is not None:
        read_records(plan.finetune.data, limit=1)
    for section in sections:
        if section.tasks:
            load_tasks(section.tasks, include_path=section.include_path)


def _check_place(plan: RunFile, out: Path, force: bool) -> bool:
    """Make the folder, and say whether to go on with what is in it: with what the same run left."""
    noted = out / _NOTED
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; expected a folder for the run, or nothing")
    before, now = _noted(noted), yaml.safe_load(plan.to_yaml())
    same = before is not None and _goes_on(before, now)
    if out.is_dir() and any(out.iterdir()) and not same and not force:
        raise CheckpointError(
            f"{out} holds something that is not this run; choose another folder, or ask for it to be replaced (force)"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    if before is not None and same and not force:
        _note(plan, out, [section for section in _MEASURED if before.get(section) != now.get(section)])
    return same and not force


def _goes_on(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether what a run made is what another makes too, as far as the first went: not fine-tuned, it can be yet."""
    free = {*_MEASURED, *({"finetune"} - before.keys())}
    return all(before.get(key) == now.get(key) for key in {*before, *now} - free)


def _noted(file: Path) -> dict[str, Any] | None:
    """A run file as it was noted, without the defaults of today; None where there is none."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _note(plan: RunFile, out: Path, changed: Iterable[str] = _MEASURED) -> None:
    """Note down a run, and remove what was measured by sections that are not as they were."""
    try:
        for name in (name for section in changed for name in _MEASURED[section]):
            (out / name).unlink(missing_ok=True)
        _write(out / _NOTED, plan.to_yaml())
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error


def _begin(plan: RunFile, out: Path) -> None:
    """Remove what another run made, and only then note down this one: it must not take that for its own."""
    try:
        for made in (out / "pruned", out / "finetuned"):
            if (made / "config.json").is_file():
                shutil.rmtree(made)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    _note(plan, out)


def _write(path: Path, text: str) -> None:
    """In place at once: nobody finds half a file."""
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)


def _finished(report: RunReport, step: str) -> bool:
    report.checkpoints[step] = report.directory / step
    done = (report.checkpoints[step] / "config.json").is_file()
    if done:
        report.kept.append(step)
    return done


# ---- the steps ----


def _prune(
    plan: RunFile,
    report: RunReport,
    load: Callable[..., Any],
    saved: torch.dtype | None,
    tokenizer: Any,
    progress: Progress,
) -> None:
    report.checkpoints["pruned"] = report.directory / "pruned"
    wanted = plan.calibration
    ids = mixed_tokens(
        wanted.sources, tokenizer, samples=wanted.samples, seq_len=wanted.seq_len, seed=wanted.seed, bos=wanted.bos
    )
    with progress(f"load {plan.model}"):
        dense = load(plan.model)
    drawn_from = wanted.sources or ["prose of the Python language reference"]
    notes = {"model": plan.model, "calibration": ", ".join(drawn_from)}
    result = prune(dense, ids, recipe=plan.passes, seed=wanted.seed, notes=notes, progress=progress)
    if result.model is None:
        raise ModelError(f"{result.module_failure}; nothing was written")
    _begin(plan, report.directory)
    result.save(report.checkpoints["pruned"], tokenizer=tokenizer, force=True, dtype=saved)
    report.pruned = result


def _finetune(
    plan: RunFile,
    section: FinetuneSection,
    settings: FinetuneSettings | None,
    report: RunReport,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    progress: Progress,
) -> None:
    if _finished(report, "finetuned"):
        return
    target = report.checkpoints["finetuned"]
    resume = report.pruned is None and bool(finished_steps(target.with_name(f"{target.name}.checkpoints")))
    report.finetuned = finetune(
        report.checkpoints["pruned"],
        section.data,
        target,
        settings=settings,
        teacher=plan.model if section.teacher else None,
        resume=resume,
        force=not resume,
        device=plan.device,
        dtype=dtypes[0],
        save_dtype=dtypes[1],
        trust_remote_code=plan.trust_remote_code,
        progress=progress,
    )


def _evaluate(
    plan: RunFile,
    section: EvaluateSection,
    report: RunReport,
    load: Callable[..., Any],
    tokenizer: Any,
    progress: Progress,
) -> None:
    models: dict[str, str | Path] = {"dense": plan.model} if section.dense else {}
    options = section.model_dump(exclude={"dense"})
    for name, where in {**models, **report.checkpoints}.items():
        with progress(f"load {where}"):
            model = load(where)
        report.evaluations[name] = evaluate(model, tokenizer, progress=progress, **options)
        found = {name: each.to_dict() for name, each in report.evaluations.items()}
        _write(report.directory / "evaluation.json", json_text(found) + "\n")


def _compare(
    plan: RunFile,
    section: CompareSection,
    report: RunReport,
    load: Callable[..., Any],
    tokenizer: Any,
    progress: Progress,
) -> None:
    def tasks(model: Any, its_tokenizer: Any) -> Mapping[str, float]:
        found = evaluate_tasks(
            model,
            its_tokenizer,
            section.tasks,
            include_path=section.include_path,
            limit=section.limit,
            batch=section.batch,
            bos=section.bos,
            progress=progress,
        )
        return found.percents()

    sources: dict[str, str | Path] = {"dense": plan.model, **report.checkpoints}
    contenders = [
        Contender(name, partial(load, where), tokenizer, checkpoint=where, **_known(plan, section, report, name))
        for name, where in sources.items()
    ]
    for other in section.others:
        theirs = load_tokenizer(other, trust_remote_code=plan.trust_remote_code)
        contenders.append(Contender(other, partial(load, other), theirs, checkpoint=other))
    measures = Measures(
        texts=section.texts,
        seq_len=section.seq_len,
        tokens=section.tokens,
        bos=section.bos,
        batch=section.batch,
        tasks=tasks if section.tasks else None,
        speed=Settings() if section.speed else None,
    )
    report.comparison = compare(contenders, measures, progress=progress)
    _write(report.directory / "comparison.json", json_text(report.comparison.to_dict()) + "\n")
    _write(report.directory / "comparison.md", report.comparison.to_markdown() + "\n")


def _known(plan: RunFile, section: CompareSection, report: RunReport, name: str) -> dict[str, Any]:
    """What was measured of a model for the evaluation, as fields of its contender, where the comparison asks alike."""
    other, found = plan.evaluate, report.evaluations.get(name)
    if other is None or found is None or other.bos != section.bos:
        return {}
    known: dict[str, Any] = {}
    if (other.seq_len, other.tokens) == (section.seq_len, section.tokens):
        known["perplexities"] = found.perplexities
    asked = ("tasks", "include_path", "limit")
    if found.tasks is not None and all(getattr(other, key) == getattr(section, key) for key in asked):
        known["tasks"] = found.tasks.percents()
    return known
