"""The hook that lets Hugging Face's `from_pretrained` load pruned checkpoints.

transformers builds a model from its configuration on the meta device and then fills it. A registered quantization
method may change the empty model in between; this one gives every tensor its pruned shape and stores nothing in a
special format. What comes out is an ordinary model: it trains, takes adapters and saves itself again.

Importing this module registers the method; doing so again changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimgraph.attributes import get_attribute, set_attribute
from slimgraph.depth import SkippedLayer
from slimgraph.errors import CheckpointError
from slimgraph.manifest import AttributeValue, Manifest
from slimgraph.weightfiles import check_stored, stored_tensors

__all__ = [
    "METHOD",
    "SlimgraphConfig",
    "SlimgraphQuantizer",
    "apply",
    "attach",
    "manifest_of",
    "register",
    "tied_names",
    "verify",
]

METHOD = "slimgraph"
"""The `quant_method` of pruned checkpoints."""

_ABSENT = object()


class SlimgraphConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The entry `quantization_config` of `config.json`: the method's name and the manifest's fields beside it."""

    def __init__(self, quant_method: str = METHOD, **manifest: Any) -> None:
        self.quant_method = quant_method
        self.manifest = Manifest.from_dict(manifest, source="quantization_config in config.json")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object it was made from."""
        return {"quant_method": self.quant_method, **self.manifest.to_dict()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def get(self, key: str, default: Any = None) -> Any:
        """Like a dict's: transformers reads the entry this way, whether it comes from a file or from a loaded model."""
        return self.to_dict().get(key, default)


class SlimgraphQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Re-shapes the empty model before its weights arrive."""

    # There is no pruning on the fly: only checkpoints that were saved pruned can be loaded with this method.
    requires_calibration = True
    # Whether `save_pretrained` writes weights too; not where they are written layer by layer.
    stores_weights = True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The weights to save: the model's own, or none."""
        return (None if self.stores_weights else {}), {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        manifest = self.quantization_config.manifest
        try:
            apply(model, manifest)
        except CheckpointError as error:
            where = f"config.json of {model.config.name_or_path or 'the model'}"
            raise CheckpointError(f"{where}: {error}; copy or save the checkpoint again") from None
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            stored = stored_tensors(Path(file) for file in checkpoint_files)
            check_stored(stored, manifest.stored_shapes(), tied_names(model))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # The weights are plain floats. Where a model says otherwise, trainers refuse to train the weights and adapters
        # leave out what gradient checkpointing needs.
        model.is_quantized = False
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """None: checkpoints hold the model's own names and layouts.

        Conversions from other layouts split and permute by the sizes in the configuration, which are the original's.
        """
        return []

    def is_serializable(self) -> bool:
        """`save_pretrained` works as for any model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters and the weights themselves train as in any model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` works as for any model."""
        return True


def register() -> None:
    """Make the method known to transformers."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SlimgraphConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(SlimgraphQuantizer)


def apply(model: PreTrainedModel, manifest: Manifest) -> None:
    """Give a model fresh from its class the structure that the manifest describes; the values are left undefined.

    Args:
        model: as its class builds it from the configuration, on any device. Changed in place.
        manifest: what is different in the pruned model.

    Raises:
        CheckpointError: the manifest does not fit the model.
    """
    for path, outputs in manifest.skipped.items():
        model.set_submodule(path, SkippedLayer(_module(model, path), outputs))
    aliases = tied_names(model)
    for name, shape in manifest.shapes.items():
        # Tied weights are one tensor under several names, all of which must get its shape.
        for each in {name} | (aliases.get(name, set()) - manifest.shapes.keys()):
            _reshape(model, each, shape, manifest.original_shapes[name])
    for name, shape in manifest.added.items():
        _add_parameter(model, name, shape)
    for name, spec in manifest.buffers.items():
        _set_buffer(model, name, spec["shape"], getattr(torch, spec["dtype"]))
    for path, values in manifest.attributes.items():
        _set_attributes(model, path, values)


def attach(model: PreTrainedModel, manifest: Manifest) -> None:
    """Tell a pruned model in memory what it is, so that its own `save_pretrained` writes a checkpoint that loads again.

    Afterwards it is as if it had been loaded: trainers that save along the way, or a merged adapter, need nothing else.

    Args:
        model: a pruned transformers model. Only its bookkeeping is changed: the manifest's buffers become persistent.
        manifest: what is different from its class; see `verify`.
    """
    config = SlimgraphConfig(**manifest.to_dict())
    model.config.quantization_config = config
    model.hf_quantizer = SlimgraphQuantizer(config, pre_quantized=True)
    model.quantization_method = METHOD
    model._weight_conversions = []  # saved under its own names and layouts, as the quantizer loads it
    for name in manifest.buffers:
        module, leaf = _owner(model, name)
        module._non_persistent_buffers_set.discard(leaf)


def manifest_of(model: nn.Module) -> Manifest | None:
    """The manifest of a model that was pruned before; None for any other."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config.manifest if isinstance(config, SlimgraphConfig) else None


def verify(model: PreTrainedModel, manifest: Manifest) -> None:
    """Check that the manifest leads from the model's class, as built from its configuration, to the model.

    Args:
        model: a pruned transformers model.
        manifest: what is said to be different from its class.

    Raises:
        CheckpointError: names the first difference.
    """
    with torch.device("meta"):
        expected = type(model)(copy.deepcopy(model.config))
    hint = (
        "the manifest must list every change against the class as built from the model's configuration (Manifest.after "
        "for a model that had been pruned before)"
    )
    try:
        apply(expected, manifest)
    except CheckpointError as error:
        raise CheckpointError(f"the manifest does not describe the model: {error}; {hint}") from None
    found_shapes, expected_shapes = _stored_shapes(model), _stored_shapes(expected)
    found_shapes |= _common_buffers(model, expected)
    expected_shapes |= _common_buffers(expected, model)
    for name in sorted(found_shapes.keys() | expected_shapes.keys()):
        found, wanted = found_shapes.get(name), expected_shapes.get(name)
        if found != wanted:
            raise CheckpointError(
                f"the manifest does not describe the model: tensor {name!r} has shape {found} in the model, "
                f"the manifest leads to {wanted} (None: no such tensor); {hint}"
            )
    for name, spec in manifest.buffers.items():
        if (dtype := model.get_buffer(name).dtype) != getattr(torch, spec["dtype"]):
            raise CheckpointError(
                f"the manifest does not describe the model: buffer {name!r} is {dtype}, not {spec['dtype']}; {hint}"
            )
    for path, values in manifest.attributes.items():
        _check_attributes(model, path, values)


def tied_names(model: PreTrainedModel) -> dict[str, set[str]]:
    """For every tied parameter the other names of the same tensor."""
    groups: dict[str, set[str]] = {}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        groups.setdefault(source, {source}).add(target)
    return {name: group - {name} for group in groups.values() for name in group}


def _owner(model: PreTrainedModel, name: str) -> tuple[nn.Module, str]:
    """The module that a tensor belongs to, and the tensor's name in it."""
    path, _, leaf = name.rpartition(".")
    return _module(model, path), leaf


def _module(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f"the manifest names the module {path!r}, {type(model).__name__} as built from its configuration has none "
            f"({error})"
        ) from None
    return module


def _reshape(model: PreTrainedModel, name: str, shape: list[int], original: list[int]) -> None:
    module, leaf = _owner(model, name)
    old = getattr(module, leaf, None)
    if not isinstance(old, Tensor) or list(old.shape) != original:
        found = list(old.shape) if isinstance(old, Tensor) else "no such tensor"
        raise CheckpointError(
            f"the manifest changes {name!r} from {original} to {shape}, {type(model).__name__} as built from its "
            f"configuration has {found}"
        )
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    if leaf in module._buffers:
        module._buffers[leaf] = new
        return
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)  # marks such as "no weight decay" that classes put on their parameters
    setattr(module, leaf, parameter)


def _add_parameter(model: PreTrainedModel, name: str, shape: list[int]) -> None:
    module, leaf = _owner(model, name)
    # A module that reads the parameter has it as None; where there is no such attribute, adding one would do nothing.
    if getattr(module, leaf, _ABSENT) is not None:
        raise CheckpointError(
            f"the manifest adds the parameter {name!r}, {type(model).__name__} as built from its configuration "
            f"has no {type(module).__name__} there whose {leaf!r} is None"
        )
    like = next(module.parameters(), next(model.parameters()))
    setattr(module, leaf, nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device)))


def _set_buffer(model: PreTrainedModel, name: str, shape: list[int], dtype: torch.dtype) -> None:
    module, leaf = _owner(model, name)
    current = getattr(module, leaf, None)
    if leaf in module._parameters or not isinstance(current, Tensor | None):
        raise CheckpointError(
            f"the manifest keeps the buffer {name!r}, {type(model).__name__} as built from its configuration has a "
            f"{type(current).__name__} there"
        )
    module.__dict__.pop(leaf, None)  # a table kept as a plain attribute becomes a buffer
    # As a persistent buffer it is filled, placed and saved like a weight, and what the class computes for buffers that
    # it does not store leaves it alone.
    module.register_buffer(leaf, torch.empty(shape, dtype=dtype, device=next(model.parameters()).device))


def _set_attributes(model: PreTrainedModel, path: str, values: Mapping[str, AttributeValue]) -> None:
    module = _module(model, path)
    for name, value in values.items():
        current = _attribute(module, name)
        if not isinstance(current, bool | int | float | str | list | tuple | None):
            found = "no such attribute" if current is _ABSENT else f"a {type(current).__name__}"
            raise CheckpointError(
                f"the manifest sets the attribute {name!r} of {path or 'the model'!r} to {value}, "
                f"{type(model).__name__} as built from its configuration has {found} there"
            )
        set_attribute(module, name, _as_python(value, like=current))


def _attribute(module: torch.nn.Module, name: str) -> object:
    try:
        return get_attribute(module, name)
    except AttributeError:
        return _ABSENT


def _as_python(value: AttributeValue, *, like: object) -> object:
    """JSON knows no tuples."""
    if not isinstance(value, list):
        return value
    return tuple(value) if isinstance(like, tuple) else list(value)


def _check_attributes(model: PreTrainedModel, path: str, values: Mapping[str, AttributeValue]) -> None:
    module = _module(model, path)
    for name, value in values.items():
        found = _attribute(module, name)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise CheckpointError(
                f"the manifest does not describe the model: attribute {name!r} of {path or 'the model'!r} is {found}, "
                f"not {value}; record the value that the pruned module has"
            )


def _stored_shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _common_buffers(model: PreTrainedModel, other: PreTrainedModel) -> dict[str, list[int]]:
    """Shapes of the buffers that both models have. A buffer in one of them alone may be a cache made while running."""
    shared = {name for name, _ in model.named_buffers()} & {name for name, _ in other.named_buffers()}
    return {name: list(model.get_buffer(name).shape) for name in shared}


register()
