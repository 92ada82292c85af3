"""The whole way: a checkpoint and instruction records in, the fine-tuned checkpoint out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from slimgraph import checkpoint, hf
from slimgraph.errors import DataError, ModelError
from slimgraph.finetune.adapters import adapted, check_peft
from slimgraph.finetune.checkpoints import Checkpoints
from slimgraph.finetune.processes import Processes
from slimgraph.finetune.records import Example, Record, encode, prompt, read_records
from slimgraph.finetune.settings import FinetuneSettings
from slimgraph.finetune.training import Training, seed_of
from slimgraph.manifest import Manifest
from slimgraph.pipeline import Result
from slimgraph.pretrained import check_finite, check_tokens, load_model, load_tokenizer
from slimgraph.progress import SILENT, Progress

__all__ = ["FinetuneResult", "finetune"]

Data: TypeAlias = str | Path | Sequence[Mapping[str, Any]]
"""Where records lie, or the records themselves; see `slimgraph.finetune.records.read_records`."""

_MAY_DIFFER = {"micro_batch", "save_steps"}  # between a run and its continuation


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """A fine-tuned model and what it took.

    Attributes:
        model: with the adapters merged, in evaluation mode.
        directory: of the checkpoint.
        loss_before: mean loss per learned token of the held-out records; None where none were held out.
        loss_after: the same for the merged model.
        held_out: number of held-out records.
        records: number of records trained on.
        dropped: number of records of which the cutoff left nothing to learn.
        steps: optimiser steps.
        tokens: tokens that went through the model in training, padding not counted.
        seconds: of training, all sittings of a resumed run together.
        trained: number of parameters trained.
        parameters: of the model.
        micro_batch: records that went through the model at once in the end.
        processes: that shared the work.
        first_process: whether this is the one of them that wrote the checkpoint.
    """

    model: nn.Module
    directory: Path
    loss_before: float | None
    loss_after: float | None
    held_out: int
    records: int
    dropped: int
    steps: int
    tokens: int
    seconds: float
    trained: int
    parameters: int
    micro_batch: int
    processes: int
    first_process: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the model."""
        data = {name: value for name, value in vars(self).items() if name not in ("model", "first_process")}
        return {**data, "directory": str(self.directory)}

    def __repr__(self) -> str:
        name, dropped = type(self.model).__name__, f", {self.dropped:,} left out" if self.dropped else ""
        speed = self.tokens / self.seconds if self.seconds else math.nan
        lines = [
            f"{name}: {self.trained:,} parameters trained beside {self.parameters:,}, merged",
            f"records      {self.records:,} trained on{dropped}, {self.held_out:,} held out",
            f"steps        {self.steps:,}, {self.tokens:,} tokens, {self.seconds:.1f} s, {speed:,.0f} tokens a second",
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(
                f"held out     loss {self.loss_before:.4f} -> {self.loss_after:.4f}, "
                f"perplexity {math.exp(self.loss_before):.3f} -> {math.exp(self.loss_after):.3f}"
            )
        return "\n".join([*lines, f"checkpoint   {self.directory}"])


def finetune(
    model: nn.Module | Result | str | Path,
    data: Data,
    out: str | Path,
    *,
    tokenizer: Any = None,
    settings: FinetuneSettings | None = None,
    teacher: nn.Module | str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    save_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Train LoRA adapters on instruction records, merge them into the weights and save the model.

    The published fine-tuning after pruning: `FinetuneSettings` has its values. While it runs, checkpoints lie in
    `OUT.checkpoints`; they go when the result is there. Under `torchrun` or `accelerate launch` the processes share the
    records of each step, and the first one writes.

    Args:
        model: pruned or not: a directory or name on the hub, the result of `slimgraph.prune`, or a transformers model.
            A model in memory is changed in place; where training or merging fails its weights are as before.
        data: records in Alpaca's format.
        out: directory for the checkpoint.
        tokenizer: of the model; that of the checkpoint by default.
        settings: of the run.
        teacher: the dense model, to learn from its distribution as well; it must have the same tokenizer.
        resume: go on from the last checkpoint of a run that was stopped; the outcome is as if it had not been.
        force: replace a checkpoint that is at `out`, and drop what an earlier run left.
        device: for models that are loaded.
        dtype: of models that are loaded.
        save_dtype: that floating-point parameters are written in; None for the one they have.
        trust_remote_code: let checkpoints bring their own modeling code.
        progress: shows what is going on; quiet by default.

    Raises:
        ModelError: `peft` is missing, or model, tokenizer or teacher cannot be loaded or do not fit.
        DataError: the records are missing, malformed, too few, or cannot be reached.
        CheckpointError: `out` is taken or cannot be written, or there is nothing to resume from.
        NumericsError: NaN or infinity in weights, loss or gradients, or a weight too large for `save_dtype`.
    """
    check_peft()
    chosen = settings or FinetuneSettings()
    target = Path(out)
    checkpoint.check_target(target, force=force)
    processes = Processes(_place(model, device))
    shown = (progress or SILENT) if processes.first else SILENT
    load = partial(load_model, dtype=dtype, device=processes.device, trust_remote_code=trust_remote_code)
    load_words = partial(load_tokenizer, trust_remote_code=trust_remote_code)

    records = read_records(data, limit=chosen.records)
    tokenizer = tokenizer or _tokenizer(model, load_words)
    with shown("tokenise"):
        examples = encode(records, tokenizer, cutoff=chosen.cutoff, mask_prompt=chosen.mask_prompt)
    learned, held_out = _split(examples, chosen)
    with shown("load"):
        subject = _subject(model, load)
        guide = _teacher(teacher, tokenizer, records[0], load, load_words)
    manifest = hf.manifest_of(subject)
    hf.verify(subject, manifest or Manifest.empty())
    _check_fit(subject, examples)

    identity = _identity(subject, guide, examples, chosen, processes)
    checkpoints = _checkpoints(target, identity, processes, resume=resume, force=force)
    with _drawn_from(chosen.seed, processes.device), adapted(subject, chosen) as adapters:
        training = Training(adapters.model, adapters.trained, chosen, processes, shown, guide)
        loss_before = training.loss(held_out)
        training.run(learned, checkpoints, resume=resume)
        adapters.merge()
        loss_after = training.loss(held_out, subject)
    result = FinetuneResult(
        model=subject.eval(),
        directory=target,
        loss_before=loss_before,
        loss_after=loss_after,
        held_out=len(held_out),
        records=len(learned),
        dropped=len(records) - len(examples),
        steps=training.counters.step,
        tokens=training.counters.tokens,
        seconds=training.counters.seconds,
        trained=sum(p.numel() for p in adapters.trained.values()),
        parameters=sum(p.numel() for p in subject.parameters()),
        micro_batch=training.micro_batch,
        processes=processes.size,
        first_process=processes.first,
    )
    if processes.first:
        with shown("save"):
            noted = None if manifest is None else _noted(manifest, result, chosen, _named(data), teacher)
            checkpoint.save(subject, target, noted, tokenizer=tokenizer, force=force, dtype=save_dtype)
        checkpoints.remove()
    return result


def _place(model: nn.Module | Result | str | Path, device: str | torch.device) -> torch.device:
    """Where a model in memory is, or where one that is loaded shall be."""
    module = model.model if isinstance(model, Result) else model
    return next(module.parameters()).device if isinstance(module, nn.Module) else torch.device(device)


def _subject(model: nn.Module | Result | str | Path, load: Callable[[str | Path], nn.Module]) -> nn.Module:
    """The module to train."""
    if isinstance(model, Result) and model.model is None:
        raise ModelError(model.module_failure or "the module was not pruned")
    found = model.model if isinstance(model, Result) else model
    subject: nn.Module = found if isinstance(found, nn.Module) else load(found)  # type: ignore[arg-type]
    if not isinstance(subject, PreTrainedModel):
        raise ModelError(f"cannot fine-tune a {type(subject).__name__}, expected a transformers model or its directory")
    check_finite(subject)
    return cast(nn.Module, subject)


def _tokenizer(model: nn.Module | Result | str | Path, load: Callable[[str | Path], Any]) -> Any:
    if isinstance(model, nn.Module | Result):
        raise ModelError("a model in memory comes without its tokenizer, which the records need; give tokenizer=")
    return load(model)


def _split(examples: Sequence[Example], settings: FinetuneSettings) -> tuple[list[Example], list[Example]]:
    """Those to learn, and those held out."""
    count = max(1, round(settings.held_out * len(examples))) if settings.held_out else 0
    if count >= len(examples):
        raise DataError(
            f"{count} of {len(examples)} records would be held out, expected some to train on; give more records, or "
            "hold out none (held_out 0)"
        )
    drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed_of(settings.seed)))
    apart = set(drawn[:count].tolist())
    learned = [example for number, example in enumerate(examples) if number not in apart]
    return learned, [examples[number] for number in sorted(apart)]


def _check_fit(model: nn.Module, examples: Sequence[Example]) -> None:
    longest = max((example.ids for example in examples), key=len)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and len(longest) > positions:
        raise ModelError(
            f"records of {len(longest)} tokens are longer than the {positions} positions of {type(model).__name__}; "
            f"ask for a cutoff of at most {positions}"
        )
    extremes = [min(min(e.ids) for e in examples), max(max(e.ids) for e in examples)]
    check_tokens(model, torch.tensor([extremes]))


def _teacher(
    teacher: nn.Module | str | Path | None,
    tokenizer: Any,
    record: Record,
    load: Callable[[str | Path], nn.Module],
    load_words: Callable[[str | Path], Any],
) -> nn.Module | None:
    """The teacher, frozen, once it is known that it reads the same tokens."""
    if teacher is None:
        return None
    if isinstance(teacher, nn.Module):
        return teacher.eval()
    its_own = load_words(teacher)
    text = prompt(record) + record.output
    if its_own.get_vocab() != tokenizer.get_vocab() or its_own(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise ModelError(
            f"the teacher {teacher} has another tokenizer, expected the same one; give the dense model that the pruned "
            "one was made from"
        )
    return load(teacher)


def _checkpoints(
    target: Path, identity: dict[str, Any], processes: Processes, *, resume: bool, force: bool
) -> Checkpoints:
    checkpoints = Checkpoints(target.with_name(f"{target.name}.checkpoints"), identity)
    if force and not resume and processes.first:
        checkpoints.remove()
    processes.wait()
    if not resume:
        checkpoints.check_unused()
    processes.wait()  # nobody writes before all have looked
    return checkpoints


def _identity(
    model: nn.Module,
    teacher: nn.Module | None,
    examples: Sequence[Example],
    settings: FinetuneSettings,
    processes: Processes,
) -> dict[str, Any]:
    """What decides the outcome of a run."""
    data = hashlib.sha256(repr([(e.ids, e.learned_from) for e in examples]).encode())
    return {
        **{name: value for name, value in settings.to_dict().items() if name not in _MAY_DIFFER},
        "model": _fingerprint(model),
        "teacher": None if teacher is None else _fingerprint(teacher),
        "data": data.hexdigest()[:16],
        "processes": processes.size,
    }


def _fingerprint(model: nn.Module) -> str:
    """Of names, shapes and the first values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:16].double().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {first}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's global generators begin at the seed, and are as before in the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _named(source: object) -> str:
    """For the record: where something lies, or that it was given in memory."""
    return str(source) if isinstance(source, str | Path) else "in memory"


def _noted(
    manifest: Manifest,
    result: FinetuneResult,
    settings: FinetuneSettings,
    data: str,
    teacher: nn.Module | str | Path | None,
) -> Manifest:
    """The manifest, with a note of this run after those of earlier ones beside the recipe."""
    numbers = ("records", "held_out", "steps", "tokens", "loss_before", "loss_after")
    note = {
        "data": data,
        "teacher": None if teacher is None else _named(teacher),
        "settings": settings.to_dict(),
        **{name: getattr(result, name) for name in numbers},
    }
    notes = dict(manifest.recipe.get("notes") or {})
    notes["finetune"] = [*notes.get("finetune", []), note]
    return replace(manifest, recipe={**manifest.recipe, "notes": notes})
