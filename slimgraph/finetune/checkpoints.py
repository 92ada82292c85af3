"""Checkpoints of a run: safetensors and JSON, each a folder that appears whole or not at all.

A run draws all its random numbers from its seed and the number of the step, so that the trained parameters, the
optimiser's state and a few counters are all that it takes to go on exactly.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimgraph.errors import CheckpointError

__all__ = ["Checkpoints", "Counters", "finished_steps"]

_PARTIAL = ".partial-"
_STEP = "step-"
_TRAINED, _OPTIMISER, _STATE = "trained.safetensors", "optimiser.safetensors", "state.json"


@dataclass
class Counters:
    """How far a run is.

    Attributes:
        step: optimiser steps taken.
        tokens: tokens that went through the model for them, padding not counted.
        seconds: that they took, over all its sittings.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def finished_steps(directory: Path) -> list[Path]:
    """The checkpoints of a run that were written whole, the last one last."""
    return sorted(directory.glob(f"{_STEP}*"))


class Checkpoints:
    """The checkpoints of one run, in a folder of their own. Only the last one is kept.

    Args:
        directory: of the run's checkpoints; made when the first is written.
        identity: what a run must agree in to go on from another's checkpoint, as JSON.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self.directory = directory
        self._identity = identity

    def save(self, counters: Counters, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Write a checkpoint and remove those before it.

        Raises:
            CheckpointError: it cannot be written.
        """
        name = f"{_STEP}{counters.step:08d}"
        partial = self.directory / f"{_PARTIAL}{name}"
        state = {"counters": asdict(counters), "run": self._identity}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({n: p.detach().contiguous() for n, p in trained.items()}, partial / _TRAINED)
            save_file(_flat(trained, optimiser), partial / _OPTIMISER)
            (partial / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            partial.rename(self.directory / name)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"the run's checkpoint {self.directory / name} cannot be written ({error}); make room, or ask for no "
                "checkpoints (save_steps 0)"
            ) from error
        for old in self._steps()[:-1]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> Counters:
        """Put the last checkpoint's values into the parameters and the optimiser.

        Returns:
            How far that run was.

        Raises:
            CheckpointError: there is none, it is damaged, or the run was another one.
        """
        steps = self._steps()
        if not steps:
            raise CheckpointError(
                f"there is no checkpoint of a run in {self.directory}, expected one to resume from; start the run "
                "without resume"
            )
        last = steps[-1]
        try:
            state = json.loads((last / _STATE).read_text(encoding="utf-8"))
            counters = Counters(**state["counters"])
            self._check_identity(last, state["run"])
            values, flat = load_file(last / _TRAINED), load_file(last / _OPTIMISER)
            _fill(trained, values)
            optimiser.load_state_dict({**optimiser.state_dict(), "state": _nested(trained, flat)})
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{last} is damaged ({type(error).__name__}: {error}), expected {_TRAINED}, {_OPTIMISER} and {_STATE} "
                "of one run; delete the folder and start again"
            ) from error
        return counters

    def check_unused(self) -> None:
        """Raise CheckpointError where an earlier run left checkpoints."""
        if steps := self._steps():
            raise CheckpointError(
                f"{steps[-1]} is left from an earlier run; go on with it (resume), or throw it away (force)"
            )

    def remove(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return finished_steps(self.directory)

    def _check_identity(self, place: Path, found: dict[str, Any]) -> None:
        for key in sorted(self._identity.keys() | found.keys()):
            if found.get(key) != self._identity.get(key):
                raise CheckpointError(
                    f"{place} is of a run with {key} {found.get(key)}, this one has {self._identity.get(key)}; resume "
                    "with what it was started with, or delete the folder and start again"
                )


def _flat(trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in trained.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _nested(trained: dict[str, nn.Parameter], flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The optimiser's own form: by the number of the parameter."""
    numbers = {name: number for number, name in enumerate(trained)}
    nested: dict[int, dict[str, Tensor]] = {}
    for name_and_key, value in flat.items():
        name, _, key = name_and_key.rpartition("/")
        nested.setdefault(numbers[name], {})[key] = value
    return nested


def _fill(trained: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    if values.keys() != trained.keys():
        raise ValueError(f"it holds other parameters, {min(values.keys() ^ trained.keys())} among them")
    with torch.no_grad():
        for name, parameter in trained.items():
            if parameter.shape != values[name].shape:
                raise ValueError(f"{name} has the shape {tuple(values[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(values[name])
