"""Speed and memory of models side by side, in one process and under the same conditions.

A model is timed at what generation does: *prefill*, one forward pass over a prompt that fills the cache and gives the
logits of its last token, and *decode*, one forward pass per new token with the cache. Repetitions of the models take
turns, in alternating order, so that a machine that drifts or is shared slows all of them alike.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimgraph.cost import Cost, checkpoint_bytes, cost
from slimgraph.dtypes import dtype_name
from slimgraph.errors import EvaluationError, ModelError
from slimgraph.memory import is_out_of_memory, with_smaller_batches
from slimgraph.peak import peak_growth
from slimgraph.pretrained import check_tokens, load_model
from slimgraph.progress import SILENT, Progress
from slimgraph.tables import Column, bytes_of, count_of, relative, to_markdown, to_text

__all__ = ["Bench", "Measurement", "Rate", "Settings", "bench", "load_beside"]


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
        prompt_tokens: length of each prompt.
        new_tokens: decoded after it.
        batch: number of prompts at once.
        repetitions: that count, for each model.
        warmup: repetitions before them that do not.
        seed: of the prompts, random token ids.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch: int = 1
    repetitions: int = 5
    warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in [("prompt_tokens", 1), ("new_tokens", 1), ("batch", 1), ("repetitions", 1), ("warmup", 0)]:
            if getattr(self, name) < least:
                raise ModelError(f"{name} is {getattr(self, name)}; expected at least {least}")


@dataclass(frozen=True)
class Rate:
    """Tokens per second, over all sequences of the batch.

    Attributes:
        median: over the repetitions.
        spread: half the distance between the quartiles; 0 for one repetition.
        values: of every repetition, in order.
    """

    median: float
    spread: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> Rate:
        """From the seconds that so many tokens took, for each repetition."""
        values = tuple(tokens / s for s in seconds)
        if len(values) < 2:
            return cls(values[0], 0.0, values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, (high - low) / 2, values)

    def __str__(self) -> str:
        digits = 1 if self.median < 1000 else 0
        return f"{self.median:,.{digits}f} ± {self.spread:,.{digits}f}"


@dataclass(frozen=True)
class Measurement:
    """One model, measured.

    Attributes:
        name: of the model.
        cost: what follows from its graph.
        checkpoint_bytes: of its weight files; None when it has none.
        prefill: tokens of the prompts per second.
        decode: new tokens per second.
        peak_bytes: the weights and what memory grows by at most while one prompt is read and continued: of the
            process on a CPU, of the device on a GPU; None where the system does not say.
    """

    name: str
    cost: Cost
    checkpoint_bytes: int | None
    prefill: Rate
    decode: Rate
    peak_bytes: int | None


@dataclass(frozen=True, repr=False)
class Bench:
    """Models side by side; the first is what the others are compared with. Prints as a table.

    Attributes:
        measurements: one per model, in the order given.
        settings: how they were measured.
        device: where.
        dtype: of the weights.
        threads: of the CPU.
    """

    measurements: tuple[Measurement, ...]
    settings: Settings
    device: str
    dtype: str
    threads: int

    def __repr__(self) -> str:
        return f"{to_text(self._columns(), self.measurements)}\n{self.note}"

    def to_markdown(self) -> str:
        """The same as a Markdown table."""
        return f"{to_markdown(self._columns(), self.measurements)}\n\n{self.note}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers in bytes, seconds and tokens."""
        return asdict(self)

    def _columns(self) -> list[Column[Measurement]]:
        dense = self.measurements[0]
        return [
            Column("model", lambda m: m.name),
            Column("parameters", lambda m: count_of(m.cost.parameters)),
            Column("MACs/token", lambda m: count_of(m.cost.macs_per_token)),
            Column("checkpoint", lambda m: bytes_of(m.checkpoint_bytes)),
            Column("cache/token", lambda m: bytes_of(m.cost.cache_bytes_per_token)),
            Column("peak memory", lambda m: bytes_of(m.peak_bytes)),
            Column("prefill tok/s", lambda m: str(m.prefill)),
            Column("", lambda m: relative(m.prefill.median, dense.prefill.median)),
            Column("decode tok/s", lambda m: str(m.decode)),
            Column("", lambda m: relative(m.decode.median, dense.decode.median)),
        ]

    @property
    def note(self) -> str:
        """How it was measured, in one line."""
        s = self.settings
        where = f"{self.threads} threads of the CPU" if self.device == "cpu" else self.device
        return (
            f"{s.batch} x {s.prompt_tokens} prompt tokens, {s.new_tokens} new tokens, {self.dtype} on {where}; median "
            f"of {s.repetitions} repetitions that take turns ± half the distance of the quartiles"
        )


def bench(
    models: Mapping[str, nn.Module],
    settings: Settings | None = None,
    *,
    checkpoints: Mapping[str, str | Path] | None = None,
    costs: Mapping[str, Cost] | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measure models side by side.

    When memory runs out, all of them are measured again with half the batch.

    Args:
        models: name -> causal language model with values, all on one device; not changed, put in evaluation mode.
        settings: how to measure.
        checkpoints: name -> directory of the model's checkpoint, where it has one.
        costs: name -> what the model costs; counted where it is not given.
        progress: shows the repetitions done.

    Raises:
        ModelError: there is no model, or a model has no cache or cannot be traced.
        EvaluationError: memory runs out with one sequence.
        CalibrationError: prompt and new tokens are more than a model has positions for.
    """
    chosen = settings or Settings()
    if not models:
        raise ModelError("no model to measure; give at least one")
    first = next(iter(models.values()))
    for model in models.values():
        model.eval()
        check_tokens(model, torch.zeros(1, chosen.prompt_tokens + chosen.new_tokens, dtype=torch.long))
    known = dict(costs or {})
    with (progress or SILENT)("count products", total=len(models)) as tick:
        for name, model in models.items():
            if name not in known:
                known[name] = cost(model, tokens=chosen.prompt_tokens)
            tick()
    runs, peaks, chosen = with_smaller_batches(
        lambda batch: _repetitions(models, replace(chosen, batch=batch), progress or SILENT), chosen.batch, "bench"
    )
    found = []
    for name in models:
        growth = peaks[name]
        found.append(
            Measurement(
                name=name,
                cost=known[name],
                checkpoint_bytes=checkpoint_bytes(checkpoints[name]) if checkpoints and name in checkpoints else None,
                prefill=Rate.of(chosen.batch * chosen.prompt_tokens, [r.prefill for r in runs[name]]),
                decode=Rate.of(chosen.batch * chosen.new_tokens, [r.decode for r in runs[name]]),
                peak_bytes=None if growth is None else known[name].weight_bytes + growth,
            )
        )
    weights = next(first.parameters())
    return Bench(
        tuple(found),
        chosen,
        str(weights.device),
        dtype_name(weights.dtype),
        torch.get_num_threads(),
    )


def load_beside(
    name: str,
    *,
    others: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model while others are in memory.

    Args:
        name: directory of a checkpoint, or a name on the hub.
        others: how many there are, for the message.
        device: where the weights go.
        dtype: of the weights.
        trust_remote_code: let the checkpoint bring its own modeling code.

    Raises:
        ModelError: it cannot be loaded.
        EvaluationError: it does not fit in memory beside the others.
    """
    try:
        return load_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    except (ModelError, RuntimeError, MemoryError) as error:
        if not any(each is not None and is_out_of_memory(each) for each in (error, error.__cause__)):
            raise
        raise EvaluationError(
            f"memory of {device} ran out while loading {name} as {dtype} with {others} other models there: give fewer "
            "models at once, or a narrower dtype like bfloat16"
        ) from error


# ---- timing ----


_EXPECTED = "expected a model that generates with a key-value cache"


@dataclass(frozen=True)
class _Run:
    """Seconds of one repetition."""

    prefill: float
    decode: float


def _repetitions(
    models: Mapping[str, nn.Module], settings: Settings, progress: Progress
) -> tuple[dict[str, list[_Run]], dict[str, int | None], Settings]:
    """Runs and peaks of all models, and the settings that they are for."""
    runners = {name: _Runner(name, model, settings) for name, model in models.items()}
    runs: dict[str, list[_Run]] = {name: [] for name in models}
    peaks: dict[str, int | None] = {}
    with progress("measure", total=len(models) * (settings.warmup + 1 + settings.repetitions)) as tick:
        for name, runner in runners.items():
            for _ in range(settings.warmup):
                runner.run()
                tick()
            peaks[name] = peak_growth(runner.run, runner.device)
            tick()
        for repetition in range(settings.repetitions):
            order = list(runners.items())
            for name, runner in order if repetition % 2 == 0 else reversed(order):
                runs[name].append(runner.run())
                tick()
    return runs, peaks, settings


class _Runner:
    """Reads prompts and continues them greedily; the tokens themselves do not matter."""

    def __init__(self, name: str, model: nn.Module, settings: Settings) -> None:
        self.name = name
        self.model = model
        self.settings = settings
        self.device = next(model.parameters()).device
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 2
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (settings.batch, settings.prompt_tokens)
        self.prompts = torch.randint(vocabulary, shape, generator=generator).to(self.device)
        accepted = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        if not open_ended and not {"past_key_values", "use_cache"} <= accepted.keys():
            raise ModelError(f"{name}: {type(model).__name__} takes no past_key_values; {_EXPECTED}")
        # As generation does: of a prompt only the last token's logits are wanted.
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.inference_mode()
    def run(self) -> _Run:
        """Seconds of one prefill and of all decoding steps after it."""
        cache: Any = None
        token = self.prompts

        def step() -> None:
            nonlocal cache, token
            output = self.model(input_ids=token, past_key_values=cache, use_cache=True, **self.options)
            cache, token = self._cache(output), output.logits[:, -1:].argmax(-1)

        def steps() -> None:
            for _ in range(self.settings.new_tokens):
                step()

        return _Run(prefill=self._seconds(step), decode=self._seconds(steps))

    def _cache(self, output: Any) -> Any:
        cache = getattr(output, "past_key_values", None)
        if cache is None or not isinstance(output.logits, Tensor):
            raise ModelError(
                f"{self.name}: {type(self.model).__name__} returned {type(output).__name__} without past_key_values; "
                f"{_EXPECTED}"
            )
        return cache

    def _seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
