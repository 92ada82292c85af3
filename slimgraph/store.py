"""Weights in the safetensors files of a checkpoint, one at a time.

A tensor is read when it is asked for, or ahead of that in the background once it is known that it will be, and belongs
to whoever asked: nothing is kept here. Files are mapped for one tensor's time only, so that what was read does not stay
in the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

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
        self._dtype, self._device = dtype, device
        self._places = _places(model, stored_tensors(weight_files(directory)), directory)
        own = {same for name, same in canonical_names(model).items() if same not in self._places}
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
        key, stored = self._places[name]
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
            # A copy in any case: the tensor is a view of the mapped file.
            return tensor.to(self._device, dtype, copy=True)


def _places(model: nn.Module, stored: Mapping[str, Stored], directory: Path) -> dict[str, tuple[str, Stored]]:
    """Canonical name of a tensor -> its name in the files, and where."""
    same = canonical_names(model)
    parameters = {same[name] for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, tuple[str, Stored]] = {}
    for name, canonical in same.items():
        key = next((k for k in _spellings(name, model) if k in stored), None)
        if key is not None and canonical not in found:
            found[canonical] = (key, stored[key])
            _check_shape(name, tensor_at(model, name), stored[key])
    for name in parameters - found.keys():
        raise ModelError(
            f"{directory} cannot be streamed: its files hold no tensor {name!r} of {type(model).__name__} (they hold "
            f"{len(stored)} others, like {next(iter(stored), 'none')!r}): load the model in memory, without streaming"
        )
    return found


def _spellings(name: str, model: nn.Module) -> Iterable[str]:
    """A name, and how the model without its head would call it."""
    yield name
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and name.startswith(f"{prefix}."):
        yield name.removeprefix(f"{prefix}.")


def _check_shape(name: str, expected: Tensor, found: Stored) -> None:
    if list(expected.shape) != found.shape:
        raise ModelError(
            f"{found.file}: tensor {name!r} has shape {found.shape}, config.json describes a model that expects "
            f"{list(expected.shape)}: give the configuration and the weights of the same model"
        )
