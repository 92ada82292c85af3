"""What a pruned checkpoint says about itself, beyond the configuration of the model it was made from.

The configuration alone describes the original class; the manifest describes everything in which the pruned model
differs from it, so that the class can be built, re-shaped and filled again. It is kept as JSON inside `config.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias, TypedDict, TypeVar

import torch
from pydantic import JsonValue, NonNegativeInt, TypeAdapter, ValidationError

from slimgraph.errors import CheckpointError

__all__ = ["AttributeValue", "BufferSpec", "Manifest"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

AttributeValue: TypeAlias = bool | int | float | str | list[int] | None


class BufferSpec(TypedDict):
    """Shape of a buffer and the name of its dtype, such as "float32"."""

    shape: list[int]
    dtype: str


_SHAPES: TypeAdapter[Any] = TypeAdapter(dict[str, list[NonNegativeInt]])
_JSON_OBJECT: TypeAdapter[Any] = TypeAdapter(dict[str, JsonValue])
_TYPES: dict[str, TypeAdapter[Any]] = {
    "shapes": _SHAPES,
    "added": _SHAPES,
    "attributes": TypeAdapter(dict[str, dict[str, bool | int | float | str | list[int] | None]]),
    "buffers": TypeAdapter(dict[str, dict[str, list[NonNegativeInt] | str]]),
    "original_shapes": _SHAPES,
    "plan": _JSON_OBJECT,
    "recipe": _JSON_OBJECT,
    "versions": TypeAdapter(dict[str, str]),
    "per_layer_config": TypeAdapter(dict[NonNegativeInt, dict[str, int]]),
    "skipped": TypeAdapter(dict[str, NonNegativeInt]),
}


@dataclass(frozen=True)
class Manifest:
    """How a pruned model differs from its class as built from `config.json`. Checked when made; never changed.

    Attributes:
        shapes: new shape of each parameter and persistent buffer whose shape changed.
        added: shape of each parameter that the class does not have, such as a bias where there was none.
        attributes: module path ("" for the model itself) -> Python attribute -> new value.
        buffers: buffers whose values the class would compute differently or not at all; they are stored with the
            weights, whether or not the class stores them.
        original_shapes: shapes before pruning: one for every entry of `shapes`, and for entries of `buffers` as known.
        plan: which units were kept. Opaque here.
        recipe: what made the model. Opaque here.
        versions: of slimgraph, torch and transformers at the time of saving.
        per_layer_config: layer -> width under the configuration's own name for it. For reading by people and tools:
            loading goes by `shapes`.
        skipped: module path of each layer that hands on what it is given -> length of the tuple that it returns, 0 for
            a tensor. No other entry names anything in it.
    """

    shapes: dict[str, list[int]]
    added: dict[str, list[int]]
    attributes: dict[str, dict[str, AttributeValue]]
    buffers: dict[str, BufferSpec]
    original_shapes: dict[str, list[int]]
    plan: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    per_layer_config: dict[int, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_type(each.name, getattr(self, each.name))
        for name, spec in self.buffers.items():
            _check_buffer(name, spec)
        self._check_names()
        self._check_originals()

    @classmethod
    def empty(cls) -> Manifest:
        """The manifest of a model that is as its class builds it."""
        return cls({}, {}, {}, {}, {}, {}, {}, {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "manifest") -> Manifest:
        """Read what `to_dict` wrote.

        Args:
            data: a JSON object.
            source: where it comes from, for messages.

        Raises:
            CheckpointError: a field is missing, unknown, or holds something it cannot hold.
        """
        known = {each.name for each in fields(cls)}
        required = {each.name for each in fields(cls) if each.default_factory is MISSING}
        if unknown := sorted(set(data) - known):
            raise CheckpointError(
                f"{source}: unknown manifest field {unknown[0]!r}, expected only {', '.join(sorted(known))}; "
                "a newer slimgraph may have written it: install that version to read it"
            )
        if missing := sorted(required - set(data)):
            raise CheckpointError(
                f"{source}: manifest field {missing[0]!r} is missing, expected {', '.join(sorted(required))}; "
                "the file is damaged: copy or save the checkpoint again"
            )
        try:
            return cls(**{**data, "per_layer_config": _integer_keys(data.get("per_layer_config", {}))})
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """A JSON object of its own, sharing nothing with the manifest."""
        data = asdict(self)
        data["per_layer_config"] = {str(layer): widths for layer, widths in data["per_layer_config"].items()}
        return data

    def stored_shapes(self) -> dict[str, list[int]]:
        """Shapes of all tensors that the weight files must hold because of this manifest."""
        return {**self.shapes, **self.added, **{name: spec["shape"] for name, spec in self.buffers.items()}}

    def after(self, earlier: Manifest) -> Manifest:
        """The manifest of a model that was pruned twice, against the class that it started from.

        Args:
            earlier: of the model that this manifest's changes were made to.

        Returns:
            Both sets of changes in one, with the plan, recipe and versions of this manifest.

        Raises:
            CheckpointError: the changes were not made to that model.
        """
        earlier = earlier._without(self.skipped)
        before = earlier.stored_shapes()
        for name, original in self.original_shapes.items():
            if before.get(name, original) != original:
                raise CheckpointError(
                    f"the manifest changes {name!r} from {original}, the earlier one left it at {before[name]}; "
                    "combine manifests in the order in which the model was pruned"
                )
        added = {**earlier.added, **self.added}
        buffers = {**earlier.buffers, **self.buffers}
        shapes = {name: shape for name, shape in earlier.shapes.items() if name not in buffers}
        for name, shape in self.shapes.items():
            if name in added:
                added[name] = shape
            elif name in buffers:
                buffers[name] = {"shape": shape, "dtype": buffers[name]["dtype"]}
            else:
                shapes[name] = shape
        originals = {**self.original_shapes, **earlier.original_shapes}
        return replace(
            self,
            shapes=shapes,
            added=added,
            buffers=buffers,
            original_shapes={name: each for name, each in originals.items() if name not in added},
            attributes=_merged(earlier.attributes, self.attributes),
            per_layer_config=_merged(earlier.per_layer_config, self.per_layer_config),
            skipped={**earlier.skipped, **self.skipped},
        )

    def _without(self, layers: Iterable[str]) -> Manifest:
        """The manifest with no word of what lies in these layers."""
        gone = set(layers)

        def rest(entries: Mapping[str, _Value]) -> dict[str, _Value]:
            return {name: each for name, each in entries.items() if not gone.intersection(_around(name))}

        numbers = {int(path.rpartition(".")[2]) for path in gone}
        return replace(
            self,
            shapes=rest(self.shapes),
            added=rest(self.added),
            attributes=rest(self.attributes),
            buffers=rest(self.buffers),
            original_shapes=rest(self.original_shapes),
            per_layer_config={layer: each for layer, each in self.per_layer_config.items() if layer not in numbers},
        )

    def _check_names(self) -> None:
        """A tensor has one entry: it is changed, added or kept, and which of them decides what loading does."""
        for one, other in (("shapes", "added"), ("shapes", "buffers"), ("added", "buffers")):
            if both := sorted(getattr(self, one).keys() & getattr(self, other).keys()):
                raise CheckpointError(
                    f"manifest lists {both[0]!r} under both {one!r} and {other!r}, expected one of them: "
                    "'added' for parameters that the class does not have, 'buffers' for buffers stored for their values"
                )
        for name in (*self.shapes, *self.added, *self.buffers, *self.attributes):
            if inside := self.skipped.keys() & set(_around(name)):
                raise CheckpointError(
                    f"manifest names {name!r} in the layer {min(inside)!r}, which is skipped, expected nothing "
                    "there; leave the one or the other out"
                )

    def _check_originals(self) -> None:
        for name, shape in self.shapes.items():
            original = self.original_shapes.get(name)
            if original is None or len(original) != len(shape):
                raise CheckpointError(
                    f"manifest gives {name!r} the shape {shape} and the original shape {original}, expected an "
                    "original shape with as many dimensions; record the shape that the tensor had before pruning"
                )
        if strays := sorted(self.original_shapes.keys() - self.shapes.keys() - self.buffers.keys()):
            raise CheckpointError(
                f"manifest gives an original shape for {strays[0]!r}, which is neither in 'shapes' nor in 'buffers'; "
                "list the tensor's new shape as well, or leave the original out"
            )


def _check_type(name: str, value: object) -> None:
    try:
        _TYPES[name].validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = " -> ".join([name, *(str(part) for part in first["loc"] if not _is_type_label(part))])
        raise CheckpointError(f"manifest field {place}: found {first['input']!r}, expected: {first['msg']}") from None
    if not _is_finite(value):
        raise CheckpointError(f"manifest field {name}: found NaN or infinity, expected what JSON can hold; use null")


def _is_type_label(part: int | str) -> bool:
    """Pydantic puts the names of union members and of key checks between the keys of a path."""
    return part in ("bool", "int", "float", "str", "none", "dict", "[key]") or str(part).startswith("list[")


def _check_buffer(name: str, spec: Mapping[str, object]) -> None:
    if spec.keys() != {"shape", "dtype"} or not isinstance(spec["shape"], list):
        raise CheckpointError(
            f"manifest field buffers -> {name}: found {dict(spec)}, expected "
            '{"shape": [sizes], "dtype": "float32" or another name of a torch dtype}'
        )
    if not isinstance(getattr(torch, str(spec["dtype"]), None), torch.dtype):
        raise CheckpointError(
            f"manifest field buffers -> {name} -> dtype: found {spec['dtype']!r}, expected the name of a torch dtype "
            "without the prefix, such as 'float32'"
        )


def _merged(
    one: Mapping[_Key, dict[str, _Value]], other: Mapping[_Key, dict[str, _Value]]
) -> dict[_Key, dict[str, _Value]]:
    """Entry by entry, the other's values before the one's."""
    return {key: {**one.get(key, {}), **other.get(key, {})} for key in {**one, **other}}


def _around(name: str) -> Iterator[str]:
    """A dotted name and those of all modules that it lies in."""
    steps = name.split(".")
    return (".".join(steps[:i]) for i in range(1, len(steps) + 1))


def _is_finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_finite(each) for each in value.values())
    if isinstance(value, list):
        return all(_is_finite(each) for each in value)
    return not isinstance(value, float) or math.isfinite(value)


def _integer_keys(layers: object) -> object:
    """JSON has only strings as keys; what is no number stays as it is, for the type check to refuse."""
    if not isinstance(layers, Mapping):
        return layers
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: value for key, value in layers.items()}
