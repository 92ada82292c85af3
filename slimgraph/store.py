"""Weights in the safetensors files of a checkpoint, one at a time.

A tensor is read when it is asked for, or ahead of that in the background once it is known that it will be, and belongs
to whoever asked: nothing is kept here. Files are mapped for one tensor's time only, so that what was read does not stay
in the process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from slimgraph.errors import ModelError
from slimgraph.trace import canonical_names, tensor_at
from slimgraph.weightfiles import Stored, stored_tensors, weight_files

__all__ = ["Store"]


class Store:
    """Fetches the tensors of a model from its checkpoint, by the names that they have in the model.

    Args:
        directory: of the checkpoint.
        model: with the shapes that the files must have; buffers that are in no file are the model's own.
        dtype: that floating-point weights are converted to.
        device: where they are put.

    Raises:
        CheckpointError: a file is missing or damaged.
        ModelError: a weight of the model is in no file under its name, or has another shape there.
    """

    def __init__(self, directory: Path, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device, self._model = dtype, device, model
        self._stored = stored_tensors(weight_files(directory))
        self._places = _places(model, self._stored, directory)
        own = {same for same in canonical_names(model).values() if same not in self._places}
        self._buffers = {name: tensor_at(model, name).to(device) for name in own}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._ahead: dict[str, Future[Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """Names of all tensors that are in the files."""
        return list(self._places)

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name, in the dtype and on the device asked for."""
        if name in self._buffers:
            return self._buffers[name]
        if name in self._ahead:
            return self._ahead.pop(name).result()
        return self._read(name)

    def expect(self, names: Sequence[str]) -> None:
        """Read these in the background, in this order; what was read ahead and is not among them is dropped."""
        wanted = [n for n in names if n in self._places]
        for name in self._ahead.keys() - set(wanted):
            self._ahead.pop(name).cancel()
        for name in wanted:
            if name not in self._ahead:
                self._ahead[name] = self._reader.submit(self._read, name)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, name: str) -> Tensor:
        place = self._places[name]
        if place.converter is None:
            (_, key), *_ = place.keys
            return self._converted(self._stored_tensor(key))
        converter = copy.deepcopy(place.converter)
        for pattern, key in place.keys:
            converter.add_tensor(place.first, key, pattern, self._stored_tensor(key))
        made = converter.convert(place.first, model=self._model, config=getattr(self._model, "config", None))
        tensor = made[place.name]
        return self._converted(tensor[0] if isinstance(tensor, list) else tensor)

    def _stored_tensor(self, key: str) -> Tensor:
        with safe_open(self._stored[key].file, framework="pt") as file:
            # A copy: the tensor is a view of the mapped file, all of which would stay mapped.
            tensor: Tensor = file.get_tensor(key).clone()
            return tensor

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the model comes from.

    Attributes:
        name: in the model.
        keys: (pattern, name in the files) of what it is made of; a single one where it is stored as it is.
        converter: of transformers, for models whose files are laid out otherwise, like experts one by one.
        first: the first of the tensors that the converter makes.
    """

    name: str
    keys: list[tuple[str, str]]
    converter: Any = None
    first: str = ""


def _places(model: nn.Module, stored: Mapping[str, Stored], directory: Path) -> dict[str, _Place]:
    """Canonical name of a tensor -> where it comes from.

    Names and layouts are changed as `from_pretrained` would, by transformers' own rules for the class.
    """
    expected = model.state_dict()
    rules = _rules(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    made: dict[str, _Place] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if name not in expected:
            continue
        if pattern is None:
            _check_shape(name, expected[name], stored[key])
            made[name] = _Place(name, [("", key)])
            continue
        converter = by_pattern[pattern]
        first, *others = converter.target_patterns
        for target in [name, *(name.replace(first, other) for other in others)]:
            made.setdefault(target, _Place(target, [], converter, name)).keys.append((pattern, key))
    found: dict[str, _Place] = {}
    for name, canonical in canonical_names(model).items():
        if name in made:
            found.setdefault(canonical, made[name])
    for name, _ in model.named_parameters():
        if name not in found:
            raise ModelError(
                f"{directory} cannot be streamed: its files hold no tensor {name!r} of {type(model).__name__} (they "
                f"hold {len(stored)} others, like {next(iter(stored), 'none')!r}): load the model in memory, without "
                "streaming"
            )
    return found


def _rules(model: nn.Module) -> list[Any]:
    """Transformers' conversions for the class; pruned checkpoints hold the model's own names and layouts."""
    pruned = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    if pruned or not isinstance(model, PreTrainedModel):
        return []
    return list(get_model_conversion_mapping(model))


def _check_shape(name: str, expected: Tensor, found: Stored) -> None:
    if list(expected.shape) != found.shape:
        raise ModelError(
            f"{found.file}: tensor {name!r} has shape {found.shape}, config.json describes a model that expects "
            f"{list(expected.shape)}: give the configuration and the weights of the same model"
        )
