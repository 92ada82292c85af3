"""What the safetensors files of a checkpoint hold, read from their headers alone.

A truncated, missing or foreign file is found here, before anything is built or read in full.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from slimgraph.errors import CheckpointError

__all__ = ["Stored", "check_stored", "stored_tensors", "weight_files"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: list[int]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or those that its index names.

    Raises:
        CheckpointError: there are none, or the index is damaged or names a file that is not there.
    """
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    index = directory / _INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; expected a checkpoint with safetensors weights: "
            "save the model again, or convert its weights if they are in another format"
        )
    files = sorted({directory / name for name in _read_index(index).values()})
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, {index.name} expects it; copy the whole checkpoint again")
    return files


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """Name, shape and place of every tensor in `files`.

    Raises:
        CheckpointError: a file is not a whole safetensors file.
    """
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a dict, cannot be iterated
                    stored[name] = Stored(file, list(tensors.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} is damaged or incomplete ({error}), expected a whole safetensors file; "
                "copy or save the checkpoint again"
            ) from error
    return stored


def check_stored(
    stored: Mapping[str, Stored], expected: Mapping[str, list[int]], aliases: Mapping[str, set[str]]
) -> None:
    """Refuse files that lack an expected tensor or hold it with another shape.

    Args:
        stored: what the files hold.
        expected: shape by name.
        aliases: other names of the same tensor; tied weights are stored under one of their names.

    Raises:
        CheckpointError: names the file, the tensor, what was found and what was expected.
    """
    for name, shape in expected.items():
        found = stored.get(name) or next((stored[each] for each in aliases.get(name, ()) if each in stored), None)
        if found is None:
            files = ", ".join(sorted({str(each.file) for each in stored.values()})) or "the weight files"
            raise CheckpointError(
                f"{files}: tensor {name!r} is missing, the manifest in config.json expects it with shape {shape}; "
                "config and weights do not belong together, or the checkpoint is incomplete: copy or save it again"
            )
        if found.shape != shape:
            raise CheckpointError(
                f"{found.file}: tensor {name!r} has shape {found.shape}, the manifest in config.json expects {shape}; "
                "config and weights do not belong together: copy or save the checkpoint again"
            )


def _read_index(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f'{index} cannot be read ({type(error).__name__}: {error}), expected {{"weight_map": {{tensor: file}}}}; '
            "copy or save the checkpoint again"
        ) from error
    return {str(tensor): str(file) for tensor, file in names.items()}
