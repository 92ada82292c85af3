"""The output of a streamed run: one safetensors file per finished layer, and enough beside it to go on from there.

A run lives in a folder beside its target, `.NAME.slimgraph-run`, until it is published. Of a run that was killed, that
folder holds whole files only (each is written under another name first), and `run.json` says up to where they count.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slimgraph import distributed
from slimgraph.allocator import give_back
from slimgraph.axes import size
from slimgraph.dtypes import cast_to
from slimgraph.errors import CheckpointError, NumericsError
from slimgraph.execute import Parking
from slimgraph.groups import Structure
from slimgraph.plan import Plan, Resolved, resolve
from slimgraph.progress import Stopwatch
from slimgraph.surgery import Refit
from slimgraph.sweep import Decision
from slimgraph.trace import canonical_names
from slimgraph.units import Units

__all__ = ["NOTES", "Shards", "run_folder"]

_RUN = ".slimgraph-run"
NOTES = "run.json"
_PARKED = "parked"
_INDEX = "model.safetensors.index.json"


def run_folder(target: Path) -> Path:
    """Where a run that is to end at `target` lives until then."""
    return target.with_name(f".{target.name}{_RUN}")


@dataclass
class _Notes:
    """What `run.json` holds.

    Attributes:
        fingerprint: of everything that decides the result; a run is only gone on with under the same one.
        layer: the last finished layer, -1 for none.
        similarity: cosine similarity per layer, once measured.
        units: site name -> units that stay.
        files: tensor name -> file.
    """

    fingerprint: str
    layer: int = -1
    similarity: list[float] | None = None
    units: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


class Shards:
    """A `slimgraph.state.Sink` that writes finished layers to disk.

    As a context manager it removes the folder again where the run ends in an error before its first layer is finished.

    Args:
        folder: of the run; made, or gone on with.
        fingerprint: of everything that decides the result.
        structure: of the dense model.
        model: the dense model, its parameters stand-ins.
        fetch: real tensors by name.
        stand_in: tensors of any shape that need no memory.
        units: site name -> its units, for every site that may be cut.
        device: where parked values go.
        resume: go on with the run that lies in the folder.
        watch: collects the seconds of writing.
        dtype: that floating-point parameters are written in; None for the one they are fetched in.

    Raises:
        CheckpointError: there is a stopped run and `resume` was not asked for; or the run there is another one.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        structure: Structure,
        model: nn.Module,
        fetch: Callable[[str], Tensor],
        stand_in: Callable[[Sequence[int]], Tensor],
        units: Mapping[str, Units],
        device: torch.device,
        *,
        resume: bool = False,
        watch: Stopwatch | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._folder, self._structure, self._fetch, self._stand_in = folder, structure, fetch, stand_in
        self._watch = watch or Stopwatch()
        same = canonical_names(model)
        stored = dict.fromkeys(same[name] for name in model.state_dict())
        self._names = list(stored)
        self._dtype = dtype
        self._buffers = {name for name, _ in model.named_buffers()}
        self._refits: dict[str, tuple[Units, Decision]] = {}
        self._notes = _opened(folder, fingerprint, resume)
        self._earlier = {name: self._remembered(units[name], kept) for name, kept in self._notes.units.items()}
        self._start: tuple[int, Parking] | None = None
        if self._notes.layer >= 0:
            parked = Parking.load(self._parked(self._notes.layer), device)
            self._start = (self._notes.layer, parked)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._notes.layer < 0 and distributed.is_first():
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- what a sweep asks --------------------------------------------------------------------------------------------

    @property
    def earlier(self) -> Mapping[str, Decision]:
        """Site name -> what was decided there before this run began."""
        return self._earlier

    @property
    def start(self) -> tuple[int, Parking] | None:
        """Layer after which the sweep goes on, and what was parked there."""
        return self._start

    @property
    def similarity(self) -> list[float] | None:
        """Of the layers of the dense model, where the stopped run had measured it."""
        return self._notes.similarity

    def measured(self, similarity: list[float] | None) -> None:
        """Keep the similarity for a run that goes on; it is written with the next layer."""
        self._notes.similarity = similarity

    def stand_in(self, shape: Sequence[int]) -> Tensor:
        """A parameter of that shape that needs no memory of its own."""
        return self._stand_in(shape)

    def decided(self, units: Units, decision: Decision) -> Decision:
        """Keep the new projection until its layer is written."""
        self._refits[units.site.name] = (units, decision)
        self._notes.units[units.site.name] = decision.units.tolist()
        return self._light(decision)

    def layer_done(self, layer: int, parking: Parking) -> None:
        """Write the layer, then what is parked, then that both count."""
        path = f"{self._structure.layers[layer]}."
        parked = self._parked(layer)
        with self._watch("write"):
            if distributed.is_first():
                plan = Plan()
                for units, decision in self._refits.values():
                    plan = plan.merged(Plan(units.cut(decision.units.cpu())))
                resolved = resolve(self._structure, plan)
                self._write([n for n in self._names if n.startswith(path)], layer, resolved)
            parked.mkdir(parents=True, exist_ok=True)
            parking.save(parked)
        self._refits.clear()
        distributed.barrier()
        self._notes.layer = layer
        if distributed.is_first():
            _replace(self._folder / NOTES, json.dumps(asdict(self._notes)))
        distributed.barrier()
        shutil.rmtree(self._parked(layer - 1), ignore_errors=True)
        give_back()

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self, plan: Plan, buffers: Mapping[str, Tensor]) -> None:
        """Write the layers that the sweep did not reach, what no layer holds, and the index.

        Args:
            plan: all of it.
            buffers: tensors beyond the weights that the checkpoint must hold.
        """
        resolved = resolve(self._structure, plan)
        for layer, path in enumerate(self._structure.layers):
            if layer > self._notes.layer:
                self._write([n for n in self._names if n.startswith(f"{path}.")], layer, resolved)
        rest = [n for n in self._names if n not in self._notes.files]
        self._write(rest, len(self._structure.layers), resolved, buffers)
        files = sorted(set(self._notes.files.values()))
        total = sum((self._folder / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._notes.files.items()))}
        _replace(self._folder / _INDEX, json.dumps(index, indent=2))

    def forget(self, target: Path) -> None:
        """The run was published: what only its going on needed goes."""
        (target / NOTES).unlink(missing_ok=True)
        shutil.rmtree(target / _PARKED, ignore_errors=True)

    def _write(
        self, names: Sequence[str], number: int, resolved: Resolved, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        """Slice these tensors, put in what was refitted, and write them as one file."""
        count = len(self._structure.layers) + 1
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        new: dict[str, Tensor] = {}
        for units, decision in self._refits.values():
            new |= _refitted(units, decision.refit)
        tensors = {**(extra or {})}
        for name in names:
            tensors[name] = new.pop(name) if name in new else resolved.select(name, self._fetch(name))
        tensors |= new  # biases that the dense model does not have
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
            if self._dtype is not None and name not in self._buffers and tensor.is_floating_point():
                tensors[name] = cast_to(name, tensor.detach(), self._dtype)
        if not tensors:
            return
        whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
        unfinished = self._folder / f"{file}.part"
        save_file(whole, unfinished, metadata={"format": "pt"})
        unfinished.replace(self._folder / file)
        self._notes.files |= dict.fromkeys(tensors, file)

    def _remembered(self, units: Units, kept: list[int]) -> Decision:
        """A decision of the stopped run; its projection is on disk already."""
        chosen = torch.tensor(kept)
        stays = torch.isin(units.members, chosen) | (units.members < 0)
        site = units.site
        out = self._structure.analysis.sources[site.parameter][site.out_dim]
        channels = stays.nonzero().flatten()
        shape = (size(self._structure.analysis.axes.find(out)), len(channels))
        has_bias = site.bias is not None or site.refit_bias in self._notes.files
        bias = self._stand_in(shape[:1]) if has_bias else None
        return Decision(chosen, channels, Refit(self._stand_in(shape), bias))

    def _light(self, decision: Decision) -> Decision:
        refit = decision.refit
        bias = None if refit.bias is None else self._stand_in(refit.bias.shape)
        return Decision(decision.units, decision.channels, Refit(self._stand_in(refit.weight.shape), bias))

    def _parked(self, layer: int) -> Path:
        return self._folder / _PARKED / f"{layer:05d}" / f"{distributed.rank()}-of-{distributed.world()}"


def _refitted(units: Units, refit: Refit) -> dict[str, Tensor]:
    """The site's new parameters by name, as they are stored."""
    site = units.site
    found = {site.parameter: refit.weight if site.in_dim == 1 else refit.weight.T}
    if refit.bias is not None:
        found[site.refit_bias] = refit.bias
    return found


def _opened(folder: Path, fingerprint: str, resume: bool) -> _Notes:
    """The notes of the run in the folder, or new ones."""
    file = folder / NOTES
    if distributed.is_first():  # alone: no other process may make the folder before it was looked at
        if folder.exists() and not resume:
            raise CheckpointError(
                f"{folder} was left by a run that was stopped: go on with it (resume), or delete it to start again"
            )
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    if not resume or not file.is_file():
        return _Notes(fingerprint)
    try:
        notes = _Notes(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): delete {folder} and start again") from error
    if notes.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder} was left by a run with another model, recipe, calibration text, dtype, samples at once "
            "or number of processes; repeat the command that was stopped, or delete the folder to start again"
        )
    return notes


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_name(f"{file.name}.part")
    with unfinished.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        raise NumericsError(f"the weight {name} holds NaN or infinity, expected finite numbers in {tensor.dtype}")
