"""Zero-shot tasks, run by lm-eval: the harness itself, in this process, around the model object.

Which examples there are, how they are put to the model and how an answer is scored is the harness's business.
What is added here: the paper's seven tasks by one name, task folders whose data lie at relative paths, the average, and
an answer in one line when something cannot be had.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import nn

from slimgraph import hub
from slimgraph.errors import EvaluationError
from slimgraph.memory import is_out_of_memory, with_smaller_batches
from slimgraph.progress import SILENT, Progress
from slimgraph.text import start_tokens

__all__ = ["PAPER_METRICS", "LoadedTasks", "TaskScore", "TaskScores", "evaluate_tasks", "load_tasks"]

PAPER = "paper"

_EXAMPLES_SEED = 1234  # the harness's own, of the examples that a task puts into its prompts

PAPER_METRICS: Mapping[str, str] = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The seven tasks of the pruning papers in their order, and the metric that their tables print for each."""


@dataclass(frozen=True)
class TaskScore:
    """What the harness reports about one task.

    Attributes:
        name: of the task, as the harness knows it.
        metrics: metric -> value, as the harness names and computes them ("acc", "acc_norm", ...).
        errors: metric -> its standard error, where the harness gives one.
        documents: number of examples that were scored.
        counted: the metric that goes into the average: the paper's for its tasks, else acc_norm or acc; None when the
            task has neither.
    """

    name: str
    metrics: Mapping[str, float]
    errors: Mapping[str, float]
    documents: int
    counted: str | None


@dataclass(frozen=True, repr=False)
class TaskScores:
    """Scores of several tasks.

    Attributes:
        scores: one per task, in the order asked.
        limit: examples per task that were scored at most; None for all.
        seconds: wall-clock time.
    """

    scores: tuple[TaskScore, ...]
    limit: int | None
    seconds: float

    @property
    def average(self) -> float:
        """Mean over tasks of the metric that counts; NaN when no task has one."""
        values = [s.metrics[s.counted] for s in self.scores if s.counted is not None]
        return sum(values) / len(values) if values else math.nan

    @property
    def average_error(self) -> float:
        """Standard error of the average, tasks taken as independent; NaN where one of theirs is not known."""
        errors = [s.errors.get(s.counted, math.nan) for s in self.scores if s.counted is not None]
        return math.sqrt(sum(e * e for e in errors)) / len(errors) if errors else math.nan

    def percents(self) -> dict[str, float]:
        """The metric that counts of each task, and under "average" their mean; in percent."""
        counted = {s.name: s.metrics[s.counted] for s in self.scores if s.counted is not None}
        return {name: 100 * value for name, value in {**counted, "average": self.average}.items()}

    def __repr__(self) -> str:
        width = max(len("average"), *(len(s.name) for s in self.scores))
        lines = [f"{'task':<{width}}  examples              acc         acc_norm  counts"]
        for s in self.scores:
            shown = "  ".join(_cell(s, metric) for metric in ("acc", "acc_norm"))
            others = " ".join(f"{k} {v:.4f}" for k, v in s.metrics.items() if k not in ("acc", "acc_norm"))
            lines.append(f"{s.name:<{width}}  {s.documents:>8,}  {shown}  {s.counted or '-'} {others}".rstrip())
        average = f"{100 * self.average:.2f} ± {100 * self.average_error:.2f}"
        return "\n".join([*lines, f"{'average':<{width}}  {'':>8}  {average:>15}"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the average says which metric of each task went in."""
        return {
            "tasks": {s.name: {k: v for k, v in asdict(s).items() if k != "name"} for s in self.scores},
            "average": self.average,
            "average_error": self.average_error,
            "averaged": {s.name: s.counted for s in self.scores if s.counted is not None},
            "limit": self.limit,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, as the harness holds them.

    Attributes:
        entries: name -> the harness's tasks or groups of that name.
        manager: the harness's index of tasks.
    """

    entries: Mapping[str, list[Any]]
    manager: Any


def load_tasks(
    tasks: Sequence[str], *, include_path: str | Path | None = None, progress: Progress | None = None
) -> LoadedTasks:
    """Find tasks and read their data.

    Args:
        tasks: names, groups or tags as the harness knows them, with `*` and `?` as wildcards; "paper" stands for the
            seven of `PAPER_METRICS`.
        include_path: folder with task files of the harness's format, which go before its own. A file's name for the
            data may be relative to the working directory, to the folder, or to a folder above it. Of "paper" the tasks
            in the folder are taken whose names are the paper's or end in them, like `my_boolq`. A task file may name
            Python code beside it, which runs: give folders that you trust.
        progress: shows that something is going on.

    Raises:
        EvaluationError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    with _quietly(), (progress or SILENT)("read tasks"):
        catalogue = _Catalogue.of(tasks, include_path)
        return LoadedTasks({name: catalogue.load(name) for name in catalogue.names}, catalogue.manager)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] | LoadedTasks,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    bos: str = "auto",
    progress: Progress | None = None,
) -> TaskScores:
    """Score a model on tasks of lm-eval, without examples in the prompt unless a task says otherwise.

    Args:
        model: a causal language model of transformers, dense or pruned; used as it is, in evaluation mode.
        tokenizer: of the model; not changed.
        tasks: names, see `load_tasks`, or what it returned.
        include_path: folder with task files, see `load_tasks`.
        limit: only the first so many examples of each task.
        batch: requests at once; halved as often as memory runs out.
        bos: whether prompts begin with a start-of-text token, see `slimgraph.text.start_tokens`.
        progress: shows the tasks done.

    Raises:
        EvaluationError: what `load_tasks` raises, or one request does not fit into memory.
    """
    progress = progress or SILENT
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks, include_path=include_path)
    speaker = _tokenizer(tokenizer, bos)
    scores: list[TaskScore] = []
    begun = time.perf_counter()
    with _quietly(), progress("tasks", total=len(loaded.entries)) as tick:
        for name, found in loaded.entries.items():

            def run(size: int, name: str = name, found: list[Any] = found) -> tuple[list[TaskScore], int]:
                return _evaluate(model, speaker, name, found, loaded.manager, limit, size, bos), size

            mine, batch = with_smaller_batches(run, batch, f"task {name}")
            scores += mine
            tick()
    return TaskScores(tuple(scores), limit, time.perf_counter() - begun)


@dataclass(frozen=True)
class _Catalogue:
    """The harness's index of tasks, and the names that were asked for."""

    manager: Any
    names: tuple[str, ...]
    folder: Path | None

    @classmethod
    def of(cls, tasks: Sequence[str], include_path: str | Path | None) -> _Catalogue:
        """Names are looked up in the folder first: the harness's own index takes seconds to make."""
        manager_class = _task_manager()
        folder = None if include_path is None else Path(include_path).expanduser()
        if not tasks:
            raise EvaluationError("no task was named; expected names of tasks, or 'paper' for the seven of the paper")
        if folder is not None and not folder.is_dir():
            raise EvaluationError(f"the task folder {folder} does not exist; give a folder with task files (*.yaml)")
        if folder is not None:
            local = manager_class(include_path=str(folder), include_defaults=False)
            if not local.all_tasks:
                raise EvaluationError(f"the task folder {folder} has no task files (*.yaml with a key `task`)")
            found = _matching(local, tasks)
            if all(found.values()):
                return cls(local, _flat(found), folder)
        manager = manager_class(include_path=None if folder is None else str(folder))
        found = _matching(manager, tasks)
        for asked, names in found.items():
            if not names:
                raise EvaluationError(_unknown(asked, manager.all_tasks, folder))
        return cls(manager, _flat(found), folder)

    def load(self, name: str) -> list[Any]:
        """The harness's objects of a name, with their data."""
        with hub.without_waiting() as online:
            try:
                loaded = self.manager.load(self._spec(name))
            except Exception as error:  # whatever a task file or a data set makes of it
                raise EvaluationError(_why(name, online, error)) from error
        group = loaded.get("groups", {}).get(name)
        return [group] if group is not None else list(loaded["tasks"].values())

    def _spec(self, name: str) -> Any:
        """The name, or where its data lie at paths that do not resolve from here, the name with paths that do."""
        entry = self.manager.task_index[name]
        options = (entry.cfg or {}).get("dataset_kwargs") or {}
        files = options.get("data_files")
        if files is None or entry.yaml_path is None:
            return name
        # A list of one task with changed fields is how the harness takes changes to a task it knows.
        changed = {**options, "data_files": _resolved(files, Path(entry.yaml_path).resolve().parent)}
        return {"group": f"{name} with its data", "task": [{"task": name, "dataset_kwargs": changed}]}


def _task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            "tasks are run by the package lm-eval, which is not installed: pip install 'slimgraph[eval]', after torch"
        ) from error
    return TaskManager


def _matching(manager: Any, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Asked name -> names of the index."""
    known = manager.all_tasks
    wanted = [w for task in tasks for w in (PAPER_METRICS if task == PAPER else [task])]
    found: dict[str, list[str]] = {}
    for name in wanted:
        if name in known:
            found[name] = [name]
        elif any(c in name for c in "*?["):
            found[name] = manager.match_tasks([name])
        else:
            alike = [k for k in known if k.endswith(f"_{name}")] if name in PAPER_METRICS and PAPER in tasks else []
            found[name] = alike[:1] if len(alike) == 1 else []
    return found


def _flat(found: Mapping[str, list[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in found.values() for name in names))


def _unknown(asked: str, known: Sequence[str], folder: Path | None) -> str:
    close = difflib.get_close_matches(asked, known, n=3)
    where = "lm-eval" if folder is None else f"lm-eval and {folder}"
    hint = f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
    return f"no task is called {asked!r} among the {len(known):,} of {where}; {hint}"


def _resolved(files: Any, folder: Path) -> Any:
    """Data files, with relative paths made absolute: from here, from the folder, or from one above it."""
    if isinstance(files, Mapping):
        return {split: _resolved(each, folder) for split, each in files.items()}
    if isinstance(files, (list, tuple)):
        return [_resolved(each, folder) for each in files]
    path = Path(str(files))
    if "://" in str(files) or path.is_absolute():
        return files
    places = [Path.cwd(), folder, *folder.parents]
    return next((str((place / path).resolve()) for place in places if (place / path).exists()), files)


def _why(name: str, online: bool, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if online or not isinstance(error, OSError):
        return f"the task {name} cannot be read ({reason.rstrip('.')}); expected a task file and data that can be read"
    return (
        f"the data of task {name} are not in the local cache, and the hub cannot be reached (no network, or "
        f"HF_HUB_OFFLINE is set: {reason.rstrip('.')}); offline, give a folder of task files with their data "
        "(--include-path), or run once with a network, after which the cache has them"
    )


def _tokenizer(tokenizer: Any, bos: str) -> Any:
    """A copy for the harness, which may give it a padding token, and which begins texts as asked."""
    wanted = start_tokens(tokenizer, bos)
    mine = copy.deepcopy(tokenizer)
    if wanted and not start_tokens(mine):
        mine.add_bos_token = True
        if start_tokens(mine) != wanted:
            raise EvaluationError(
                "bos is 'always', and this tokenizer cannot be made to begin every text with its start-of-text token; "
                "expected a fast tokenizer of transformers: use 'auto' or 'never' for tasks"
            )
    return mine


def _evaluate(
    model: Any, tokenizer: Any, name: str, found: list[Any], manager: Any, limit: int | None, batch: int, bos: str
) -> list[TaskScore]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch,
            add_bos_token=False if bos == "never" else None,
            prefix_token_id=_before_nothing(tokenizer),
        )
        loaded = manager.load(found)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_EXAMPLES_SEED)
        # Not `simple_evaluate`: that one sets random seeds and runs git in the working directory.
        results: dict[str, Any] = lm_eval.evaluate(wrapped, task_dict=loaded, limit=limit, log_samples=False)
    except Exception as error:  # whatever a task makes of data that it does not fit
        if is_out_of_memory(error):
            raise
        raise EvaluationError(_why(name, True, error)) from error
    finally:
        model.train(was_training)
    return [_score(task, row, results.get("n-samples", {})) for task, row in results["results"].items()]


def _before_nothing(tokenizer: Any) -> int | None:
    """The token before an empty prompt, where the harness finds none itself: it takes start or end of text."""
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return None
    return int(tokenizer.unk_token_id or 0)


def _score(name: str, row: Mapping[str, Any], documents: Mapping[str, Any]) -> TaskScore:
    values = {key.partition(",")[0]: value for key, value in row.items() if isinstance(value, (int, float))}
    metrics = {k: float(v) for k, v in values.items() if not k.endswith("_stderr") and k != "sample_len"}
    errors = {k.removesuffix("_stderr"): float(v) for k, v in values.items() if k.endswith("_stderr")}
    count = documents.get(name, {}).get("effective", values.get("sample_len", 0))
    return TaskScore(name, metrics, errors, int(count), _counted(name, metrics))


def _counted(name: str, metrics: Mapping[str, float]) -> str | None:
    paper = next((m for task, m in PAPER_METRICS.items() if name == task or name.endswith(f"_{task}")), None)
    return next((m for m in (paper, "acc_norm", "acc") if m in metrics), None)


def _cell(score: TaskScore, metric: str) -> str:
    if metric not in score.metrics:
        return f"{'-':>15}"
    text = f"{100 * score.metrics[metric]:.2f} ± {100 * score.errors.get(metric, math.nan):.2f}"
    return f"{text:>15}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No bars and warnings of the harness, and no random numbers drawn; Slimgraph's own progress goes on."""
    theirs = logging.getLogger("lm_eval")
    level, drawn, drawn_by_numpy = theirs.level, random.getstate(), numpy.random.get_state()
    theirs.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars obey nothing else
            yield
    finally:
        theirs.setLevel(level)
        random.setstate(drawn)
        numpy.random.set_state(drawn_by_numpy)
