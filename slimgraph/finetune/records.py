"""Instruction records in Alpaca's format: read, checked, made into tokens, and gathered into batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slimgraph import corpora, hub
from slimgraph.errors import DataError
from slimgraph.text import Tokenizer

__all__ = ["IGNORED", "Batch", "Example", "Record", "collate", "encode", "prompt", "read_records"]

IGNORED = -100
"""Label of tokens that do not enter the loss, as everywhere in PyTorch."""

_SUFFIXES = {".json", ".jsonl"}
_INTRODUCTION = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)
_WITH_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Record:
    """An instruction with its answer, and the input that the instruction is about ("" for none)."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Example:
    """A record as tokens.

    Attributes:
        ids: token ids, at most the cutoff.
        learned_from: index of the first token that is to be learned; those before it are the prompt's.
    """

    ids: tuple[int, ...]
    learned_from: int

    @property
    def learned(self) -> int:
        """Number of tokens that enter the loss. Nothing predicts the first token, so it never does."""
        return len(self.ids) - max(self.learned_from, 1)


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right.

    Attributes:
        ids: (examples, tokens) int64.
        mask: (examples, tokens) int64, 0 at padding.
        labels: (examples, tokens) int64: the ids, or `IGNORED` for what is not to be learned.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


def read_records(source: str | Path | Sequence[Mapping[str, Any]], *, limit: int | None = None) -> list[Record]:
    """Read records with the keys `instruction`, `output` and, where there is one, `input`. Other keys are left alone.

    Args:
        source: path of a JSON file (a list of records) or JSON Lines file (one on each line); or
            `name[:config][@split]` of a data set as `datasets` knows it; or the records themselves.
        limit: only the first so many.

    Raises:
        DataError: the source is missing, empty or cannot be read or reached, or a record lacks something.
    """
    if not isinstance(source, (str, Path)):
        rows: Iterable[Any] = source
    elif _is_file(source):
        rows = _read_file(Path(source).expanduser())
    else:
        rows = _read_dataset(str(source), limit)
    name = str(source) if isinstance(source, (str, Path)) else "the data"
    records = [_record(name, number, row) for number, row in enumerate(islice(rows, limit), 1)]
    if not records:
        raise DataError(f"{name} has no records, expected some with the keys instruction, input and output")
    return records


def prompt(record: Record) -> str:
    """What comes before the answer, in the form that Alpaca's records are trained with."""
    text = _INTRODUCTION.format(_WITH_INPUT if record.input else "") + f"\n\n### Instruction:\n{record.instruction}\n\n"
    return text + (f"### Input:\n{record.input}\n\n" if record.input else "") + "### Response:\n"


def encode(records: Sequence[Record], tokenizer: Tokenizer, *, cutoff: int, mask_prompt: bool) -> list[Example]:
    """Make records into tokens. Those of which the cutoff leaves nothing to learn are dropped.

    The end of an answer is marked where the tokenizer has a token for it and the cutoff leaves room.

    Args:
        records: to be encoded.
        tokenizer: of the model.
        cutoff: tokens of an example at most.
        mask_prompt: learn the answer only.

    Raises:
        DataError: nothing is left.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    found = [_example(record, tokenizer, end, cutoff, mask_prompt) for record in records]
    examples = [example for example in found if example.learned > 0]
    if not examples:
        raise DataError(
            f"no answer of {len(records)} records begins within the first {cutoff} tokens, so that there is nothing to "
            "learn; ask for a larger cutoff or learn the prompts too"
        )
    return examples


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Examples as tensors on `device`, padded to the longest."""
    ids = [torch.tensor(example.ids) for example in examples]
    labels = [
        torch.where(torch.arange(len(row)) < example.learned_from, IGNORED, row)
        for row, example in zip(ids, examples, strict=True)
    ]
    mask = [torch.ones_like(row) for row in ids]
    return Batch(*(_padded(rows, fill).to(device) for rows, fill in ((ids, 0), (mask, 0), (labels, IGNORED))))


def _padded(rows: list[Tensor], fill: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=fill)


def _example(record: Record, tokenizer: Tokenizer, end: int | None, cutoff: int, mask_prompt: bool) -> Example:
    before = prompt(record)
    ids = list(tokenizer(before + record.output, verbose=False)["input_ids"])
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    learned_from = _shared(ids, tokenizer(before, verbose=False)["input_ids"]) if mask_prompt else 0
    return Example(tuple(ids[:cutoff]), min(learned_from, cutoff))


def _shared(ids: Sequence[int], prompt_ids: Sequence[int]) -> int:
    """Tokens that both begin with. A token across the end of the prompt holds a piece of the answer: it is learned."""
    pairs = enumerate(zip(ids, prompt_ids, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(ids), len(prompt_ids)))


def _record(source: str, number: int, row: Any) -> Record:
    if not isinstance(row, Mapping):
        raise DataError(f"record {number} of {source} is {_short(row)}, expected an object with instruction and output")
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            found = _short(row[key]) if key in row else f"only the keys {', '.join(map(str, row)) or '(none)'}"
            raise DataError(
                f"record {number} of {source} has no {key!r}: found {found}, expected a text that is not empty; mend "
                "or remove the record"
            )
    extra = row.get("input")
    if not isinstance(extra, str | None):
        raise DataError(f"record {number} of {source}: 'input' is {_short(extra)}, expected a text, empty for none")
    return Record(row["instruction"], extra or "", row["output"])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_file(source: str | Path) -> bool:
    """Whether a path is meant rather than a data set, whose name has one slash at most and no file suffix."""
    path = Path(source).expanduser()
    if isinstance(source, Path) or path.exists() or path.suffix.lower() in _SUFFIXES:
        return True
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _read_file(path: Path) -> list[Any]:
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        found = "a directory" if path.is_dir() else f"a file with the suffix {path.suffix!r}"
        raise DataError(f"{path} is {found}, expected a .json or .jsonl file of records")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"{path} cannot be read ({reason}), expected a JSON or JSON Lines file of records") from error
    if path.suffix.lower() == ".json":
        rows = _parse(text, str(path))
        if not isinstance(rows, list):
            raise DataError(
                f"{path} holds a {type(rows).__name__}, expected a list of records; one record on each line is .jsonl"
            )
        return rows
    lines = enumerate(text.splitlines(), 1)
    return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{place} is not JSON ({error}), expected records with instruction, input and output"
        ) from error


def _read_dataset(spec: str, limit: int | None) -> list[Any]:
    import datasets

    source = corpora.parse(spec)
    with hub.without_waiting() as online:
        try:
            streamed = limit is not None and online
            rows = datasets.load_dataset(
                source.name, source.config, split=source.split, streaming=streamed, **source.options
            )
            return list(islice(rows, limit))
        except (OSError, ValueError, RuntimeError) as error:
            reason = (
                str(error).strip().splitlines()[0] if online and str(error).strip() else "the hub cannot be reached"
            )
            raise DataError(
                f"{spec} is neither a file here nor a data set that can be read ({reason}): give the path of a JSON or "
                "JSON Lines file, or name[:config][@split] of a data set on the hub or in its local cache"
            ) from error
