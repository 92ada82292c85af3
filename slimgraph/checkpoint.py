"""Pruned models on disk: `config.json` and safetensors files that ordinary tools load, never pickle.

A checkpoint appears whole or not at all. It is written into a directory beside its place and renamed at the end; what a
killed run leaves behind carries a name that says so, and is refused by `load`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimgraph import hf
from slimgraph.dtypes import cast_to, dtype_name
from slimgraph.errors import CheckpointError
from slimgraph.manifest import Manifest
from slimgraph.weightfiles import check_stored, stored_tensors, weight_files

__all__ = [
    "check_target",
    "check_written",
    "load",
    "load_manifest",
    "publish",
    "save",
    "write_description",
]

_CONFIG = "config.json"
_TEMPLATES = "additional_chat_templates"  # the one folder that tokenizers write into a checkpoint
_PARTIAL = ".slimgraph-partial-"  # being written
_REPLACED = ".slimgraph-replaced-"  # the old checkpoint, while the new one takes its place


def save(
    model: nn.Module,
    directory: str | Path,
    manifest: Manifest | None,
    *,
    tokenizer: Any = None,
    force: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a pruned model as a checkpoint that `load` and `from_pretrained` read.

    Args:
        model: a pruned transformers model. Its weights are not changed; it is marked as pruned (`hf.attach`), so that
            its own `save_pretrained` works from then on.
        directory: where to; its parents are made. It must not exist, or be empty.
        manifest: in what the model differs from its class; None for one that does not, an ordinary model. Checked
            against the model before anything is written.
        tokenizer: saved beside the model if given; anything with `save_pretrained`.
        force: replace a checkpoint that is there.
        dtype: that floating-point parameters are written in; None for the one they have.

    Returns:
        `directory`.

    Raises:
        CheckpointError: the model or the place is unsuitable, or writing failed. The place is then as it was.
        NumericsError: a parameter is too large for `dtype`; likewise.
    """
    target = Path(directory).resolve()
    _check_model(model)
    check_target(target, force=force)
    hf.verify(model, manifest or Manifest.empty())
    if manifest is not None:
        hf.attach(model, manifest)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _partial(target) as partial, _parameters_in(model, dtype):
            _write(model, partial, tokenizer)
            shapes = {} if manifest is None else manifest.stored_shapes()
            check_stored(stored_tensors(weight_files(partial)), shapes, hf.tied_names(model))
            publish(partial, target)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{target} could not be written ({_in_short(error)}); what was there before is untouched: "
            "mend the cause or choose another directory"
        ) from error
    return Path(directory)


def write_description(
    model: nn.Module, manifest: Manifest, directory: Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None
) -> None:
    """Write everything of a checkpoint but its weights into a folder.

    Args:
        model: a pruned transformers model; its values do not matter. It is marked as pruned.
        manifest: in what it differs from its class; checked.
        directory: an existing folder.
        tokenizer: saved as well if given.
        dtype: that the parameters are written in; None for the one they have.

    Raises:
        CheckpointError: the model is not one that can be saved.
    """
    _check_model(model)
    hf.verify(model, manifest)
    hf.attach(model, manifest)
    with _partial(directory / _CONFIG) as own:  # it clears weight files that are not its own from where it saves
        quantizer: Any = model.hf_quantizer
        quantizer.stores_weights = False
        try:
            model.save_pretrained(own)  # type: ignore[operator]
        finally:
            quantizer.stores_weights = True
        if dtype is not None:
            config = json.loads((own / _CONFIG).read_text(encoding="utf-8"))
            config["dtype"] = dtype_name(dtype)
            (own / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in own.iterdir():
            if file.suffix != ".safetensors":
                file.replace(directory / file.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def check_written(directory: Path, model: nn.Module, manifest: Manifest) -> None:
    """Check that the weight files of a folder hold every tensor of a pruned model, in its shape.

    Raises:
        CheckpointError: names the tensor that is missing or has another shape.
    """
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    check_stored(stored_tensors(weight_files(directory)), {**shapes, **manifest.stored_shapes()}, hf.tied_names(model))


def load(
    directory: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a checkpoint, pruned or ordinary, and make sure that every weight came from it.

    Args:
        directory: of the checkpoint.
        dtype: of the weights; None for the one they were saved in.
        device: where to put them.
        trust_remote_code: run model code that lies in the directory.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or inconsistent.
    """
    path = Path(directory)
    manifest = load_manifest(path)
    stored_tensors(weight_files(path))
    place = torch.device(device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            device_map=None if place.type == "cpu" else {"": place},
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with both shapes
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{path} cannot be loaded ({_in_short(error)}), expected a causal language model that transformers can "
            f"build from {_CONFIG}; set trust_remote_code if it brings its own code, or copy or save it again"
        ) from error
    _check_report(path, report, pruned=manifest is not None)
    loaded: nn.Module = model
    return loaded


def load_manifest(directory: str | Path) -> Manifest | None:
    """Read in what a checkpoint differs from its class.

    Args:
        directory: of the checkpoint.

    Returns:
        The manifest, or None for a checkpoint that slimgraph did not prune.

    Raises:
        CheckpointError: there is no checkpoint, or its configuration is damaged.
    """
    path = Path(directory)
    _check_source(path)
    file = path / _CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}), expected a JSON object; copy or save the checkpoint again"
        ) from error
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(entry, dict) or entry.get("quant_method") != hf.METHOD:
        return None
    fields = {key: value for key, value in entry.items() if key != "quant_method"}
    return Manifest.from_dict(fields, source=str(file))


def check_target(directory: str | Path, *, force: bool = False) -> None:
    """Check that a checkpoint can be written there; worth asking before long work. Nothing is written.

    Raises:
        CheckpointError: the place is a file, lies below one, cannot be written, or holds something that must stay.
    """
    target = Path(directory).resolve()
    if not target.exists():
        _check_parent(target)
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a directory or nothing; choose another place")
    if not any(target.iterdir()):
        return
    if not force:
        raise CheckpointError(
            f"{target} exists and is not empty, nothing was written; choose another directory or ask for it to be "
            "replaced (force)"
        )
    if not (target / _CONFIG).is_file():
        raise CheckpointError(
            f"{target} exists, is not empty and holds no {_CONFIG}, nothing was written: only a checkpoint is ever "
            "replaced; choose another directory"
        )
    inner = (each.name for each in sorted(target.iterdir()) if each.is_dir() and each.name != _TEMPLATES)
    if folder := next(inner, None):
        raise CheckpointError(
            f"{target} holds the folder {folder!r} beside a checkpoint, nothing was written: replacing the one would "
            "delete the other; move it away, or choose another directory"
        )


def _check_parent(target: Path) -> None:
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        found = "cannot be written" if nearest.is_dir() else "is a file"
        raise CheckpointError(f"{target} cannot be made: {nearest} {found}; choose another place")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"cannot save a {type(model).__name__}, expected a transformers model; unwrap it first, and merge adapters "
            "into it (merge_and_unload)"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"the {type(model).__name__} has adapters attached, only they would be saved; merge or remove them first"
        )
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", hf.METHOD)
    if method != hf.METHOD:
        raise CheckpointError(
            f"the {type(model).__name__} was loaded quantized or converted ({method}), and a checkpoint has one such "
            "method; build the model from its configuration without quantization_config and load its state dict into it"
        )
    if on_meta := next((name for name, each in model.named_parameters() if each.is_meta), None):
        raise CheckpointError(
            f"parameter {on_meta!r} is on the meta device and has no values, expected weights in memory; "
            "load the model without offloading"
        )


def _check_source(path: Path) -> None:
    name = path.resolve().name
    if _PARTIAL in name or _REPLACED in name:
        raise CheckpointError(
            f"{path} was left behind by a run that was stopped while saving and may be incomplete, expected a finished "
            "checkpoint; delete it, or, if it is the one that was being replaced and no other is there, rename it back"
        )
    if path.is_dir() and (path / _CONFIG).is_file():
        return
    left = sorted(path.parent.glob(f".{path.name}{_REPLACED}*")) if path.name else []
    hint = f"a run was stopped while replacing it, the old one is {left[0]}: rename it" if left else "check the path"
    found = f"no {_CONFIG} in it" if path.is_dir() else "no such directory"
    raise CheckpointError(f"{path} is not a checkpoint: {found}, expected {_CONFIG} beside safetensors files; {hint}")


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, on the same file system, removed if it is still there at the end."""
    partial = _sibling(target, _PARTIAL)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sibling(target: Path, mark: str) -> Path:
    return target.with_name(f".{target.name}{mark}{secrets.token_hex(4)}")


def _write(model: nn.Module, directory: Path, tokenizer: Any) -> None:
    model.save_pretrained(directory)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


@contextmanager
def _parameters_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Floating-point parameters in another dtype for as long as they are written; None for the one they have."""
    if dtype is None:
        yield
        return
    config: Any = model.config
    said = config.dtype  # saving notes what it finds
    given = [(parameter, parameter.data) for parameter in model.parameters() if parameter.is_floating_point()]
    try:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = cast_to(name, parameter.data, dtype)
        yield
    finally:
        config.dtype = said
        for parameter, data in given:
            parameter.data = data


def publish(partial: Path, target: Path) -> None:
    """Put a finished checkpoint in its place by renaming its folder, and the old one back if that fails."""
    if not target.exists():
        partial.rename(target)
        return
    replaced = _sibling(target, _REPLACED)
    target.rename(replaced)
    try:
        partial.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check_report(path: Path, report: dict[str, Any], *, pruned: bool) -> None:
    """Transformers fills what it does not find with random numbers and says so in a log; here that is an error."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{path}: tensor {missing[0]!r} is missing in the weight files ({len(missing)} are), {_CONFIG} describes a "
            "model that expects it; the checkpoint is incomplete: copy or save it again"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {list(found)} in the weight files, {_CONFIG} describes a model that "
            f"expects {list(expected)}; config and weights do not belong together: copy or save the checkpoint again"
        )
    if pruned and (unexpected := sorted(report["unexpected_keys"])):
        raise CheckpointError(
            f"{path}: tensor {unexpected[0]!r} is in the weight files, {_CONFIG} describes a model without it; "
            "config and weights do not belong together: copy or save the checkpoint again"
        )
