"""Python attributes of modules: reading and setting them by dotted name, and seeing which ones a forward pass reads.

A dotted name like `config.width` is the attribute of an object that several modules may share. Setting it gives the
module a copy of that object of its own, so that layers can differ. A number in a name, as in `shape.0`, is a place in a
list or tuple.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from slimgraph.trace import uncached

__all__ = ["get_attribute", "integers_of", "integers_read", "set_attribute"]


def get_attribute(module: nn.Module, name: str) -> Any:
    """The value under a dotted name.

    Raises:
        AttributeError: there is none.
    """
    value: Any = module
    for step in name.split("."):
        value = _step(value, step)
    return value


def set_attribute(module: nn.Module, name: str, value: object) -> None:
    """Set the value under a dotted name; objects on the way are copied, so that nobody else sees the change."""
    first, _, rest = name.partition(".")
    setattr(module, first, _with(getattr(module, first), rest, value) if rest else value)


def integers_of(thing: object) -> dict[str, int]:
    """The integers that an object holds itself, alone or in a list or tuple, by dotted name."""
    return {name: n for attribute, value in vars(thing).items() for name, n in _integers(attribute, value)}


def _integers(name: str, value: object) -> list[tuple[str, int]]:
    if type(value) is int:
        return [(name, value)]
    if isinstance(value, (list, tuple)) and value and all(type(n) is int for n in value):
        return [(f"{name}.{i}", n) for i, n in enumerate(value)]
    return []


def _step(value: Any, step: str) -> Any:
    if not step.isdigit():
        return getattr(value, step)
    if not isinstance(value, (list, tuple)) or int(step) >= len(value):
        raise AttributeError(f"{type(value).__name__} has no place {step}")
    return value[int(step)]


def _with(thing: Any, name: str, value: object) -> Any:
    """A copy of an object with the value under a dotted name set."""
    first, _, rest = name.partition(".")
    new = _with(_step(thing, first), rest, value) if rest else value
    if first.isdigit():
        items = [*thing[: int(first)], new, *thing[int(first) + 1 :]]
        return tuple(items) if isinstance(thing, tuple) else items
    own = copy.copy(thing)
    setattr(own, first, new)
    return own


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
        uncached(watched, ids)
    return {path: log for path, log in read.items() if log}


def _watch(thing: Any, log: dict[str, int], prefix: str) -> None:
    """Make an object note its integer attributes as they are read, by giving it a class that does."""
    kind: Any = type(thing)

    class Watched(kind):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            log.update(_integers(prefix + name, value))
            return value

    Watched.__name__, Watched.__qualname__, Watched.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    with contextlib.suppress(TypeError):  # a class with its own layout cannot be exchanged; then it is not watched
        thing.__class__ = Watched
