"""LoRA adapters by `peft` on every linear projection inside a model's layers, and their merging into the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slimgraph.errors import ModelError, NumericsError
from slimgraph.finetune.settings import FinetuneSettings

__all__ = ["Adapted", "adapted", "check_peft", "projections"]

_INSIDE_A_LAYER = re.compile(r"(?:^|\.)\d+\.")  # layers are repeated under a number


class Adapted:
    """A model with adapters attached.

    Args:
        model: of `peft`.
        own: ids of the parameters that the bare model has.

    Attributes:
        model: takes and gives what the bare model does.
        trained: the parameters that are trained, by name: factors of the adapters, and biases where asked for.
    """

    def __init__(self, model: Any, own: set[int]) -> None:
        self.model = model
        self.trained: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._before = [(p, p.detach().clone()) for p in self.trained.values() if id(p) in own]
        self._attached = True

    def merge(self) -> None:
        """Add the adapters to the weights and remove them; the model is again as it was but for the weights' values.

        Raises:
            NumericsError: a weight would become NaN or infinite. The adapters are then removed without merging.
        """
        from peft.tuners.lora import LoraLayer

        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer) and not _stays_finite(layer):
                raise NumericsError(
                    f"the trained adapters cannot be merged: {name} would become NaN or infinite; train with a lower "
                    "learning rate or in float32"
                )
        self.model.merge_and_unload()
        self._attached = False

    def remove(self) -> None:
        """Remove the adapters, if they are still there, and put trained biases back as they were."""
        if not self._attached:
            return
        self.model.unload()
        self._attached = False
        with torch.no_grad():
            for bias, value in self._before:
                bias.copy_(value)


def _stays_finite(layer: Any) -> bool:
    """Whether a weight can take its adapters."""
    with torch.no_grad():
        added = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        return bool(torch.isfinite(layer.get_base_layer().weight + added).all())


def check_peft() -> None:
    """Raise ModelError where `peft` is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError("fine-tuning needs the package peft: pip install 'slimgraph[finetune]'") from error


def projections(model: nn.Module) -> list[str]:
    """Names of the linear modules inside the layers: those below a numbered module, whatever they are called.

    Raises:
        ModelError: there are none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _INSIDE_A_LAYER.search(name)
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear modules inside numbered layers, expected some to put adapters on"
        )
    return found


@contextmanager
def adapted(model: nn.Module, settings: FinetuneSettings) -> Iterator[Adapted]:
    """Attach adapters for as long as the context lasts; in it, only they are trained.

    The adapters are drawn from PyTorch's global generator. At the end those that were not merged are removed, and which
    parameters need gradients is as before.

    Args:
        model: a transformers model, changed in place.
        settings: rank, alpha, dropout, and whether biases are trained.

    Raises:
        ModelError: the model has no linear modules inside its layers, or no biases to train.
    """
    import peft

    targets = projections(model)
    modules = [model.get_submodule(name) for name in targets]
    if settings.train_biases and all(module.bias is None for module in modules):
        raise ModelError(
            f"train_biases was asked for, and none of the {len(targets)} projections of {type(model).__name__} has a "
            "bias; leave it off, or prune with a recovery that adds biases"
        )
    configuration = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="lora_only" if settings.train_biases else "none",
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in modules),
        task_type="CAUSAL_LM",
    )
    own = {id(parameter) for parameter in model.parameters()}
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft sets itself where a model mixes kinds of projections
        made = Adapted(peft.get_peft_model(model, configuration), own)
    try:
        yield made
    finally:
        made.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
