"""Text of data sets, read through `datasets`: by name and column, or by the short names of the usual test sets.

The short names are those of the pruning literature: `wikitext2`, `ptb` and `c4`. A file of that name goes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slimgraph import hub
from slimgraph.errors import CalibrationError

__all__ = ["BETWEEN", "NAMED", "Corpus", "parse", "read"]

BETWEEN = "\n\n"  # texts that are joined


@dataclass(frozen=True)
class Corpus:
    """A column of text in a data set.

    Attributes:
        name: of the data set, as `datasets.load_dataset` takes it.
        config: of the data set, or None.
        split: which part of it.
        column: the one that holds text.
        rows: at most so many of them, or None for all.
        options: further ones of `load_dataset`.
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    rows: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


NAMED: Mapping[str, Corpus] = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    # The data set itself is a script, which `datasets` does not run any more; the hub keeps its conversion.
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "validation",
        "sentence",
        options={"revision": "refs/convert/parquet"},
    ),
    # One of eight files of the validation split, and of that what Wanda and SparseGPT read.
    "c4": Corpus(
        "allenai/c4",
        split="validation",
        rows=1100,
        options={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
    ),
}


def parse(spec: str) -> Corpus:
    """Read `name[:config][@split]`, or a short name with or without a split.

    >>> parse("wikitext2").split, parse("wikitext2@validation").split, parse("a/b:c").config
    ('test', 'validation', 'c')
    """
    name_and_config, _, split = spec.partition("@")
    if name_and_config in NAMED:
        named = NAMED[name_and_config]
        return replace(named, split=split) if split else named
    name, _, config = name_and_config.partition(":")
    return Corpus(name, config or None, split or "train")


def read(spec: str, limit: int | None) -> str:
    """The text of a data set, rows joined by empty lines.

    Args:
        spec: see `parse`.
        limit: at least so many characters where there are so many; the data set is then streamed, not downloaded whole.

    Raises:
        CalibrationError: there is no such data set here or on the hub, the hub cannot be reached, or a column is
            missing.
    """
    import datasets

    corpus = parse(spec)
    with hub.without_waiting() as online:
        stream = online and (limit is not None or corpus.rows is not None)
        try:
            rows = datasets.load_dataset(
                corpus.name, corpus.config, split=corpus.split, streaming=stream, **corpus.options
            )
            _check_columns(spec, rows, corpus.column)
            return _join((row[corpus.column] for row in rows), corpus.rows, limit)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if online else "the hub cannot be reached"
            raise CalibrationError(
                f"{spec} is neither a text file here nor a data set that can be read ({reason}): give the path of a "
                "UTF-8 text file, or name[:config][@split] of a data set on the hub or in its local cache"
            ) from error


def _check_columns(spec: str, rows: Any, column: str) -> None:
    columns = rows.column_names or list(next(iter(rows), {}))
    if column not in columns:
        raise CalibrationError(
            f"the data set {spec} has no column {column!r}, found {', '.join(map(repr, columns)) or 'none'}: write "
            "its text to a file and give that"
        )


def _join(rows: Iterable[str], most: int | None, limit: int | None) -> str:
    texts: list[str] = []
    characters = 0
    for text in rows:
        texts.append(text)
        characters += len(text) + len(BETWEEN)
        if len(texts) == most or (limit is not None and characters > limit):
            break
    return BETWEEN.join(texts)
