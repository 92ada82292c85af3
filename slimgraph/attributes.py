"""Python attributes of modules: reading and setting them by dotted name, and seeing which ones a forward pass reads.

A dotted name like `config.width` is the attribute of an object that several modules may share. Setting it gives the
module a copy of that object of its own, so that layers can differ.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["get_attribute", "integers_read", "set_attribute"]


def get_attribute(module: nn.Module, name: str) -> Any:
    """The value under a dotted name.

    Raises:
        AttributeError: there is none.
    """
    value: Any = module
    for step in name.split("."):
        value = getattr(value, step)
    return value


def set_attribute(module: nn.Module, name: str, value: object) -> None:
    """Set the value under a dotted name; objects on the way are copied, so that nobody else sees the change."""
    first, _, rest = name.partition(".")
    if not rest:
        setattr(module, first, value)
        return
    own = copy.copy(getattr(module, first))
    set_attribute(own, rest, value)
    setattr(module, first, own)


def integers_read(model: nn.Module, ids: Tensor) -> dict[str, dict[str, int]]:
    """Which integer attributes a forward pass reads, on which modules.

    Args:
        model: not changed; a copy that shares its tensors is run.
        ids: (batch, tokens) int64.

    Returns:
        Module path -> dotted attribute name -> value. Attributes of a module's configuration are named `config.…`.
    """
    shared: dict[int, object] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    watched = copy.deepcopy(model, shared)
    read: dict[str, dict[str, int]] = {}
    for path, module in watched.named_modules():
        log = read.setdefault(path, {})
        config = vars(module).get("config")
        if config is not None:
            own = copy.copy(config)
            _watch(own, log, "config.")
            vars(module)["config"] = own
        _watch(module, log, "")
    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError, IndexError):
        watched(input_ids=ids)
    return {path: log for path, log in read.items() if log}


def _watch(thing: Any, log: dict[str, int], prefix: str) -> None:
    """Make an object note its integer attributes as they are read, by giving it a class that does."""
    kind: Any = type(thing)

    class Watched(kind):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if type(value) is int:
                log[prefix + name] = value
            return value

    Watched.__name__, Watched.__qualname__, Watched.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    with contextlib.suppress(TypeError):  # a class with its own layout cannot be exchanged; then it is not watched
        thing.__class__ = Watched
