"""Models against each other: size, products, cache, perplexities, tasks and speed in one table.

Models are loaded one after the other and dropped once measured, unless their speed is asked for: that is measured side
by side, with all of them in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimgraph.bench import Bench, Measurement, Settings, bench
from slimgraph.cost import Cost, checkpoint_bytes, cost
from slimgraph.errors import ModelError, PlanError
from slimgraph.perplexity import Perplexity, perplexity
from slimgraph.pipeline import Calibration, prune
from slimgraph.pretrained import check_tokens
from slimgraph.progress import SILENT, Progress
from slimgraph.tables import Column, bytes_of, count_of, to_markdown, to_text
from slimgraph.text import read_tokens, start_tokens

__all__ = ["Comparison", "Contender", "Entry", "Measures", "TaskRunner", "compare", "pruned_at"]

TaskRunner = Callable[[nn.Module, Any], Mapping[str, float]]
"""From a model and its tokenizer to a score per task in percent, in the order to show them; higher is better."""


@dataclass(frozen=True)
class Contender:
    """A model to compare.

    Attributes:
        name: in the table.
        load: makes the module, with values.
        tokenizer: of the model; None where no text is read.
        checkpoint: its directory, where it has one.
        series: name of the model that it was made of at some ratio; a picture joins these by a line.
        perplexities: measured before with the same settings, by text as `Measures.texts` has it; not measured again.
        tasks: likewise what `Measures.tasks` would return; None where it is to be asked.
    """

    name: str
    load: Callable[[], nn.Module]
    tokenizer: Any = None
    checkpoint: str | Path | None = None
    series: str | None = None
    perplexities: Mapping[str, Perplexity] = field(default_factory=dict)
    tasks: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Measures:
    """What is measured of every model.

    Attributes:
        texts: to take the perplexity on; see `slimgraph.text.read_text`.
        seq_len: tokens of each window.
        tokens: only the first so many of each text.
        bos: whether windows begin with a start-of-text token, see `slimgraph.text.start_tokens`.
        batch: windows at once.
        tasks: runs tasks; see `TaskRunner`.
        speed: how to measure tokens per second, or None.
    """

    texts: Sequence[str | Path] = ()
    seq_len: int = 128
    tokens: int | None = None
    bos: str = "auto"
    batch: int = 8
    tasks: TaskRunner | None = None
    speed: Settings | None = None


@dataclass(frozen=True)
class Entry:
    """One model of a comparison.

    Attributes:
        name: of the model.
        cost: what follows from its graph.
        checkpoint_bytes: of its weight files; None when it has none.
        perplexities: by the name of the text.
        tasks: score by task, in percent.
        speed: measured beside the others, or None.
        series: name of the model that it was made of, its own where it was not.
    """

    name: str
    cost: Cost
    checkpoint_bytes: int | None
    perplexities: Mapping[str, Perplexity] = field(default_factory=dict)
    tasks: Mapping[str, float] = field(default_factory=dict)
    speed: Measurement | None = None
    series: str = ""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Models against each other; shares are of the first. Prints as a table.

    Attributes:
        entries: one per model, in the order given.
        notes: what has to be known to read the table, one line each.
    """

    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "\n".join([to_text(self._columns(), self.entries), *self.notes])

    def to_markdown(self) -> str:
        """The same as a Markdown table."""
        return "\n\n".join([to_markdown(self._columns(), self.entries), *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers in bytes, seconds and tokens."""
        return asdict(self)

    def share(self, entry: Entry) -> float:
        """Parameters of a model over those of the first."""
        return entry.cost.parameters / self.entries[0].cost.parameters

    def _columns(self) -> list[Column[Entry]]:
        columns: list[Column[Entry]] = [
            Column("model", lambda e: e.name),
            Column("parameters", lambda e: f"{count_of(e.cost.parameters)} ({self.share(e):.1%})"),
            Column("MACs/token", lambda e: count_of(e.cost.macs_per_token)),
            Column("cache/token", lambda e: bytes_of(e.cost.cache_bytes_per_token)),
        ]
        columns += [_perplexity_column(text) for text in self.entries[0].perplexities]
        columns += [_task_column(task) for task in self.entries[0].tasks]
        if self.entries[0].speed is not None:
            columns += [
                Column("prefill tok/s", lambda e: "-" if e.speed is None else str(e.speed.prefill)),
                Column("decode tok/s", lambda e: "-" if e.speed is None else str(e.speed.decode)),
                Column("peak memory", lambda e: "-" if e.speed is None else bytes_of(e.speed.peak_bytes)),
            ]
        return columns


def compare(
    contenders: Sequence[Contender], measures: Measures | None = None, *, progress: Progress | None = None
) -> Comparison:
    """Measure models and lay them side by side.

    Args:
        contenders: the first is what the others are compared with.
        measures: what to measure; by default what follows from the graphs alone.
        progress: shows what is going on.

    Raises:
        ModelError: there is no model, two have the same name, or one cannot be traced.
        CalibrationError: a text is missing or too short.
        EvaluationError: memory runs out with the smallest batch.
    """
    wanted, shown = measures or Measures(), progress or SILENT
    names = [c.name for c in contenders]
    if not names or len(set(names)) < len(names):
        raise ModelError(f"found the models {names}; expected at least one, each with a name of its own")
    ids = {c.name: _token_ids(c, wanted) for c in contenders}  # texts that cannot be read are said before the work
    kept: dict[str, nn.Module] = {}
    entries: list[Entry] = []
    left_out: list[str] = []
    for contender in contenders:
        try:
            with shown(f"load {contender.name}"):
                model = contender.load()
        except PlanError as error:  # a ratio that cannot be reached; what the others came to is not lost for it
            if not entries:
                raise
            left_out.append(f"{contender.name} is left out: {error}")
            continue
        entries.append(_entry(contender, model, ids[contender.name], wanted, shown))
        if wanted.speed is not None:
            kept[contender.name] = model
        del model
    speeds = None
    if wanted.speed is not None:
        speeds = bench(kept, wanted.speed, costs={e.name: e.cost for e in entries}, progress=shown)
        entries = [replace(e, speed=m) for e, m in zip(entries, speeds.measurements, strict=True)]
    return Comparison(tuple(entries), (*_notes(wanted, ids, speeds), *left_out))


def pruned_at(
    name: str,
    model: nn.Module,
    ratios: Sequence[float],
    calibration: Calibration,
    *,
    tokenizer: Any = None,
    method: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Contender]:
    """The model pruned at several ratios, each from the dense one, when its turn comes. Nothing is written.

    Args:
        name: of the dense model.
        model: the dense model; not changed.
        ratios: shares of all parameters that go.
        calibration: as for `slimgraph.pipeline.prune`.
        tokenizer: of the model.
        method: as for `slimgraph.pipeline.prune`.
        progress: shows what is going on.
        options: further ones of `slimgraph.pipeline.prune`.

    Raises:
        PlanError: a ratio is out of range. One that cannot be reached is found when its turn comes, and is left out of
            a comparison with a note.
    """

    def pruned(ratio: float) -> nn.Module:
        result = prune(model, calibration, ratio, tokenizer=tokenizer, recipe=method, progress=progress, **options)
        if result.model is None:
            raise ModelError(f"{name} at {100 * ratio:g}%: {result.module_failure}")
        return result.model

    wrong = [ratio for ratio in ratios if not 0 < ratio < 1]
    if wrong:
        raise PlanError(f"the ratio {wrong[0]} is out of range; expected shares of all parameters, 0 < ratio < 1")
    return [
        Contender(f"{name} -{100 * ratio:g}%", partial(pruned, ratio), tokenizer, series=name)
        for ratio in dict.fromkeys(ratios)
    ]


def _entry(
    contender: Contender, model: nn.Module, ids: Mapping[str, Tensor], measures: Measures, progress: Progress
) -> Entry:
    with progress(f"{contender.name}: count products"):
        counted = cost(model, tokens=measures.speed.prompt_tokens if measures.speed else measures.seq_len)
    found: dict[str, Perplexity] = {}
    for text, source in _by_name(measures.texts).items():
        if known := contender.perplexities.get(str(source)):
            found[text] = known
            continue
        check_tokens(model, ids[text], measures.seq_len)
        found[text] = perplexity(
            model,
            ids[text],
            seq_len=measures.seq_len,
            batch=measures.batch,
            start=start_tokens(contender.tokenizer, measures.bos),
            progress=progress,
        )
    return Entry(
        name=contender.name,
        cost=counted,
        checkpoint_bytes=None if contender.checkpoint is None else checkpoint_bytes(contender.checkpoint),
        perplexities=found,
        tasks=_tasks(contender, model, measures),
        series=contender.series or contender.name,
    )


def _tasks(contender: Contender, model: nn.Module, measures: Measures) -> dict[str, float]:
    if measures.tasks is None:
        return {}
    return dict(measures.tasks(model, contender.tokenizer) if contender.tasks is None else contender.tasks)


def _by_name(texts: Sequence[str | Path]) -> dict[str, str | Path]:
    """Texts by their names in the table."""
    sources = {Path(text).stem or str(text): text for text in texts}
    return sources if len(sources) == len(texts) else {str(text): text for text in texts}  # of files called alike


def _token_ids(contender: Contender, measures: Measures) -> dict[str, Tensor]:
    """Tokens of every text, by the text's name in the table."""
    sources = _by_name(measures.texts)
    if not sources:
        return {}
    start = start_tokens(contender.tokenizer, measures.bos)
    special = measures.bos != "never" and not start  # those stand before every window instead
    return {
        name: read_tokens(text, contender.tokenizer, limit=measures.tokens, special=special)
        for name, text in sources.items()
    }


def _notes(measures: Measures, ids: Mapping[str, Mapping[str, Tensor]], speeds: Bench | None) -> list[str]:
    notes = []
    if measures.texts:
        notes.append(f"perplexity in windows of {measures.seq_len} tokens ± standard error; lower is better")
    counts = {name: tuple(len(tokens) for tokens in texts.values()) for name, texts in ids.items()}
    if measures.tokens is None and len(set(counts.values())) > 1:
        notes.append("the models cut the texts into different tokens: their perplexities cannot be compared")
    if measures.tasks is not None:
        notes.append("tasks zero-shot, in percent; higher is better")
    if speeds is not None:
        notes.append(f"speed: {speeds.note}")
    return notes


def _perplexity_column(text: str) -> Column[Entry]:
    def cell(entry: Entry) -> str:
        found = entry.perplexities.get(text)
        return "-" if found is None else f"{found.value:.2f} ± {found.standard_error:.2f}"

    return Column(f"ppl {text}", cell)


def _task_column(task: str) -> Column[Entry]:
    return Column(task, lambda e: f"{e.tasks[task]:.2f}" if task in e.tasks else "-")
