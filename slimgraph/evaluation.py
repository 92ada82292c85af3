"""How good a model is: perplexities on texts and scores on tasks, as one result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from slimgraph.dtypes import dtype_name
from slimgraph.errors import EvaluationError
from slimgraph.perplexity import Perplexity, perplexity
from slimgraph.pretrained import check_finite, check_tokens
from slimgraph.progress import SILENT, Progress
from slimgraph.tasks import LoadedTasks, TaskScores, evaluate_tasks, load_tasks
from slimgraph.text import read_tokens, start_tokens

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What was measured of a model.

    Attributes:
        parameters: number of parameters.
        dtype: of the weights.
        seq_len: tokens of each window of the perplexities.
        start: start-of-text tokens that stood before every window.
        perplexities: text -> perplexity on it.
        tasks: scores on tasks, or None when none were asked for.
    """

    parameters: int
    dtype: str
    seq_len: int
    start: tuple[int, ...]
    perplexities: Mapping[str, Perplexity]
    tasks: TaskScores | None

    def __repr__(self) -> str:
        lines = [f"{self.parameters:,} parameters, {self.dtype}"]
        for text, found in self.perplexities.items():
            lines.append(
                f"perplexity {found.value:.3f} ± {found.standard_error:.3f} on {text} ({found.tokens:,} tokens "
                f"predicted in {found.windows:,} windows of {self.seq_len}{self._started()}, {found.seconds:.1f} s)"
            )
        if self.tasks is not None:
            upto = "" if self.tasks.limit is None else f", the first {self.tasks.limit} examples of each"
            lines += ["", repr(self.tasks), f"zero-shot by lm-eval{upto}, in percent; {self.tasks.seconds:.1f} s"]
        return "\n".join(lines)

    def _started(self) -> str:
        return f" that begin with token {', '.join(map(str, self.start))}" if self.start else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "parameters": self.parameters,
            "dtype": self.dtype,
            "seq_len": self.seq_len,
            "start": list(self.start),
            "perplexity": {text: asdict(found) for text, found in self.perplexities.items()},
            "tasks": None if self.tasks is None else self.tasks.to_dict(),
        }


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    texts: Sequence[str | Path] = (),
    tasks: Sequence[str] | LoadedTasks = (),
    seq_len: int = 128,
    tokens: int | None = None,
    bos: str = "auto",
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure perplexities and scores. Texts and tasks are all read before anything is measured.

    Args:
        model: a causal language model of transformers, dense or pruned.
        tokenizer: of the model.
        texts: files, data sets or their short names, see `slimgraph.text.read_text`.
        tasks: names of lm-eval's tasks, see `slimgraph.tasks.load_tasks`, or what it returned.
        seq_len: tokens per window of the perplexities, at least 2.
        tokens: only the first so many tokens of each text.
        bos: whether windows and prompts begin with a start-of-text token, see `slimgraph.text.start_tokens`.
        include_path: folder with task files.
        limit: only the first so many examples of each task.
        batch: windows or requests at once; halved as often as memory runs out.
        progress: shows what is going on.

    Raises:
        EvaluationError: neither a text nor a task was given, a task cannot be had, or memory runs out.
        CalibrationError: a text cannot be had or is too short, or holds tokens that the model does not know.
        NumericsError: NaN or infinity in the weights or in a loss.
    """
    progress = progress or SILENT
    if not texts and not tasks:
        raise EvaluationError("nothing to measure was given; expected a text or a task")
    start = start_tokens(tokenizer, bos)
    with progress("read texts"):
        # Without a start token to every window the tokenizer may still add others, once, as it does to any text.
        special = bos != "never" and not start
        streams = {str(text): read_tokens(text, tokenizer, limit=tokens, special=special) for text in texts}
    loaded = _loaded(tasks, include_path, progress)
    check_finite(model)
    for ids in streams.values():
        check_tokens(model, ids, seq_len)
    perplexities = {
        text: perplexity(model, ids, seq_len=seq_len, start=start, batch=batch, progress=progress)
        for text, ids in streams.items()
    }
    scores = None
    if loaded is not None:
        scores = evaluate_tasks(model, tokenizer, loaded, limit=limit, batch=batch, bos=bos, progress=progress)
    first = next(model.parameters())
    return Evaluation(
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=dtype_name(first.dtype),
        seq_len=seq_len,
        start=tuple(start),
        perplexities=perplexities,
        tasks=scores,
    )


def _loaded(
    tasks: Sequence[str] | LoadedTasks, include_path: str | Path | None, progress: Progress
) -> LoadedTasks | None:
    if isinstance(tasks, LoadedTasks):
        return tasks
    return load_tasks(tasks, include_path=include_path, progress=progress) if tasks else None
