"""`slimgraph finetune`: what pruning cost, learned back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgraph.commands.options import (
    Device,
    Json,
    Model,
    Trust,
    Verbose,
    WorkDtype,
    check_file_target,
    device_named,
    dtype_named,
    start,
    write_json,
)
from slimgraph.finetune import FinetuneSettings, finetune
from slimgraph.pretrained import own_dtype

__all__ = ["finetune_command"]

_D = FinetuneSettings()


def finetune_command(
    model: Model,
    data: Annotated[
        str, typer.Option(help="JSON or JSON Lines file of records, or name[:config][@split] of a data set.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the fine-tuned checkpoint.")],
    epochs: Annotated[int, typer.Option(help="Passes over the records.")] = _D.epochs,
    lr: Annotated[float, typer.Option(help="Learning rate at its highest.")] = _D.learning_rate,
    batch: Annotated[int, typer.Option(help="Records of one optimiser step.")] = _D.batch,
    micro_batch: Annotated[int, typer.Option(help="Records at once; halved where memory is short.")] = _D.micro_batch,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = _D.rank,
    alpha: Annotated[int, typer.Option(help="Adapters are scaled by alpha / rank.")] = _D.alpha,
    dropout: Annotated[float, typer.Option(help="In the adapters.")] = _D.dropout,
    cutoff: Annotated[int, typer.Option(help="Tokens of a record; what is longer is cut off.")] = _D.cutoff,
    warmup_steps: Annotated[int, typer.Option(help="Steps of warm-up, at most a tenth of all.")] = _D.warmup_steps,
    mask_prompt: Annotated[
        bool, typer.Option("--mask-prompt/--learn-prompt", help="Learn the answers only, or the instructions too.")
    ] = _D.mask_prompt,
    train_biases: Annotated[
        bool, typer.Option("--train-biases", help="Train the biases of the adapted projections too.")
    ] = _D.train_biases,
    records: Annotated[int | None, typer.Option(help="Only the first so many records.")] = _D.records,
    held_out: Annotated[float, typer.Option(help="Share of the records kept for measuring the loss.")] = _D.held_out,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints of the run; 0 for none.")] = _D.save_steps,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = _D.seed,
    teacher: Annotated[str | None, typer.Option(help="The dense model, to learn from its distribution too.")] = None,
    distillation: Annotated[float, typer.Option(help="Weight of the teacher in the loss.")] = _D.distillation,
    temperature: Annotated[float, typer.Option(help="That distributions are softened by.")] = _D.temperature,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    device: Device = "cpu",
    dtype: WorkDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    to_json: Json = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a model, pruned or not, with LoRA on instruction records, and merge the adapters into its weights."""
    progress = start(verbose)
    settings = FinetuneSettings(
        epochs=epochs,
        learning_rate=lr,
        batch=batch,
        micro_batch=micro_batch,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        cutoff=cutoff,
        warmup_steps=warmup_steps,
        mask_prompt=mask_prompt,
        train_biases=train_biases,
        records=records,
        held_out=held_out,
        save_steps=save_steps,
        seed=seed,
        distillation=distillation,
        temperature=temperature,
    )
    where, precision = device_named(device), dtype_named(dtype or "float32")
    check_file_target(to_json, "--json")
    result = finetune(
        model,
        data,
        out,
        settings=settings,
        teacher=teacher,
        resume=resume,
        force=force,
        device=where,
        dtype=precision,
        save_dtype=None if dtype else own_dtype(model, trust_remote_code=trust_remote_code),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if not result.first_process:
        return
    if to_json != "-":
        typer.echo(repr(result))
    write_json(to_json, result.to_dict())
