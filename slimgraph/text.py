"""Text for calibration and evaluation: from a file, a data set or the Python documentation, to tokens, to windows.

A text is tokenised as one stream. Calibration draws windows from it at random, evaluation takes all in order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slimgraph import hub
from slimgraph.errors import CalibrationError

__all__ = [
    "Tokenizer",
    "calibration_batch",
    "calibration_tokens",
    "demo_texts",
    "is_source",
    "read_text",
    "read_tokens",
    "tokenize",
    "windows",
]

_COLUMN = "text"  # of a data set
_BETWEEN = "\n\n"  # texts that are joined
_SHORTEST_PARAGRAPH = 80  # characters of a paragraph that counts as prose
_LONGEST_PATH = 1024
_TEXT_SUFFIXES = {".csv", ".json", ".jsonl", ".log", ".md", ".parquet", ".rst", ".text", ".txt"}
_FEWEST_TOKENS = 2**20  # of a calibration text that windows are drawn from, where it has so many
_CHARACTERS_PER_TOKEN = 8  # at most, nearly always: how much text is read for a limited number of tokens


class Tokenizer(Protocol):
    """What is used of a tokenizer: a call with the text that returns `input_ids`."""

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenise `text`."""


def read_tokens(source: str | Path, tokenizer: Tokenizer, *, limit: int | None = None) -> Tensor:
    """Read text and tokenise it as one stream.

    Args:
        source: see `read_text`.
        tokenizer: of the model; special tokens are added once, as it adds them to any text.
        limit: at most so many tokens, from the start; a large data set is then not downloaded whole.

    Returns:
        (n,) int64 token ids.

    Raises:
        CalibrationError: the source is missing, empty, not text, or cannot be reached.
    """
    text = read_text(source, limit=None if limit is None else limit * _CHARACTERS_PER_TOKEN)
    tokens = tokenize(text, tokenizer)
    return tokens if limit is None else tokens[:limit]


def read_text(source: str | Path, *, limit: int | None = None) -> str:
    """Read text from a file or from a data set of the hub.

    Args:
        source: path of a UTF-8 text file, or `name[:config][@split]` of a data set as `datasets` knows it. Its column
            `text` is taken; its rows are joined by empty lines. The split is `train` unless said.
        limit: at most so many characters, from the start, cut at the end of a line where there is one; a data set is
            then streamed, not downloaded whole.

    Raises:
        CalibrationError: the source is missing, empty, not text, or cannot be reached.
    """
    path = Path(source).expanduser()
    text = _read_file(path) if _is_path(source, path) else _read_dataset(str(source), limit)
    if not text.strip():
        raise CalibrationError(f"no text in {source}: expected some lines of plain text, found none")
    return text if limit is None else _cut(text, limit)


def tokenize(text: str | list[str], tokenizer: Tokenizer) -> Tensor:
    """Tokenise as one stream.

    Args:
        text: a text, or several, which are joined by empty lines.
        tokenizer: of the model.

    Returns:
        (n,) int64 token ids.

    Raises:
        CalibrationError: there is no text, or the tokenizer makes no tokens of it.
    """
    whole = text if isinstance(text, str) else _BETWEEN.join(text)
    # Not in pieces: where a piece ends, some tokenizers merge differently.
    ids = tokenizer(whole, verbose=False)["input_ids"] if whole else []
    if not ids:
        raise CalibrationError(f"no tokens in a text of {len(whole)} characters: expected plain text that is not empty")
    return torch.tensor(ids, dtype=torch.int64)


def calibration_tokens(
    text: str | Path | Sequence[str], tokenizer: Tokenizer, *, samples: int = 32, seq_len: int = 128, seed: int = 0
) -> Tensor:
    """Calibration windows from a text or from where it lies.

    Args:
        text: a text or several; or the path of a text file or the name of a data set, see `read_text`. A string with
            white space in it that is no file is a text.
        tokenizer: of the model.
        samples: number of windows. Of a very long text only the first part is drawn from: a million tokens, or 64 times
            as many as are drawn.
        seq_len: tokens per window.
        seed: of the draw.

    Returns:
        (samples, seq_len) int64.

    Raises:
        CalibrationError: the text is missing, empty or too short.
    """
    if isinstance(text, Path) or (isinstance(text, str) and is_source(text)):
        limit = max(_FEWEST_TOKENS, 64 * samples * seq_len)
        tokens = read_tokens(text, tokenizer, limit=limit)
    else:
        tokens = tokenize(text if isinstance(text, str) else list(text), tokenizer)
    return calibration_batch(tokens, samples=samples, seq_len=seq_len, seed=seed)


def is_source(text: str) -> bool:
    """Whether a string says where a text lies, and is not one itself."""
    words = text.split()
    if len(words) == 1:
        return True
    return bool(words) and "\n" not in text and len(text) < _LONGEST_PATH and Path(text).expanduser().is_file()


def calibration_batch(tokens: Tensor, *, samples: int, seq_len: int, seed: int) -> Tensor:
    """Draw windows that do not overlap, at random.

    Args:
        tokens: (n,) int64, one stream.
        samples: number of windows.
        seq_len: tokens per window.
        seed: of the draw; the same seed draws the same windows from the same stream.

    Returns:
        (samples, seq_len) int64, in the order drawn.

    Raises:
        CalibrationError: the stream is shorter than `samples * seq_len`.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"calibration needs at least 1 sample of 1 token, not {samples} of {seq_len}")
    needed = samples * seq_len
    if len(tokens) < needed:
        raise CalibrationError(
            f"the calibration text is too short: {len(tokens)} tokens found, {needed} needed for {samples} samples of "
            f"{seq_len}; give a longer text or ask for fewer or shorter samples"
        )
    rows = windows(tokens, seq_len)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[drawn[:samples]]


def windows(tokens: Tensor, seq_len: int) -> Tensor:
    """Cut a stream into windows without overlap, dropping the tail.

    Args:
        tokens: (n,) int64, one stream.
        seq_len: tokens per window.

    Returns:
        (n // seq_len, seq_len) int64, at least one row; a view of `tokens`.

    Raises:
        CalibrationError: the stream is shorter than one window.
    """
    count = len(tokens) // seq_len
    if count == 0:
        raise CalibrationError(
            f"the text is too short: {len(tokens)} tokens found, {seq_len} needed for one window; give a longer text "
            "or ask for shorter windows"
        )
    return tokens[: count * seq_len].view(count, seq_len)


def _is_path(source: str | Path, path: Path) -> bool:
    """Whether a path is meant rather than a data set. A data set's name has one slash at most and no file suffix."""
    if isinstance(source, Path) or path.exists():
        return True
    return path.suffix.lower() in _TEXT_SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1


def _read_file(path: Path) -> str:
    if not path.exists():
        raise CalibrationError(f"the text file {path} does not exist: give the path of a UTF-8 text file")
    if not path.is_file():
        raise CalibrationError(f"{path} is not a file: give the path of a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at position {error.start}; give a plain "
            "text file"
        ) from error
    except OSError as error:
        raise CalibrationError(f"the text file {path} cannot be read: {error.strerror or error}") from error
    if "\0" in text:
        raise CalibrationError(f"{path} is a binary file (it has zero bytes), expected UTF-8 text")
    return text


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    line_end = text.rfind("\n", 0, limit)
    return text[: line_end + 1 if line_end >= limit // 2 else limit]


class _DatasetName(NamedTuple):
    name: str
    config: str | None
    split: str


def _parse_dataset(spec: str) -> _DatasetName:
    name_and_config, _, split = spec.partition("@")
    name, _, config = name_and_config.partition(":")
    return _DatasetName(name, config or None, split or "train")


def _read_dataset(spec: str, limit: int | None) -> str:
    """The data set's text, rows joined by empty lines: at least `limit` characters where there are so many."""
    import datasets

    name, config, split = _parse_dataset(spec)
    with hub.without_waiting() as online:
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=limit is not None and online)
            _check_columns(spec, rows)
            return _join(rows, limit)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if online else "the hub cannot be reached"
            raise CalibrationError(
                f"{spec} is neither a text file here nor a data set that can be read ({reason}): give the path of a "
                "UTF-8 text file, or name[:config][@split] of a data set on the hub or in its local cache"
            ) from error


def _check_columns(spec: str, rows: Any) -> None:
    columns = rows.column_names or list(next(iter(rows), {}))
    if _COLUMN not in columns:
        raise CalibrationError(
            f"the data set {spec} has no column {_COLUMN!r}, found {', '.join(map(repr, columns)) or 'none'}: write "
            "its text to a file and give that"
        )


def _join(rows: Any, limit: int | None) -> str:
    texts: list[str] = []
    characters = 0
    for row in rows:
        texts.append(row[_COLUMN])
        characters += len(texts[-1]) + len(_BETWEEN)
        if limit is not None and characters > limit:
            break
    return _BETWEEN.join(texts)


def demo_texts() -> tuple[str, str]:
    """Two different English texts that every Python carries: prose of the Python language reference.

    They need no network and may be used freely (Python's own licence). The paragraphs come from `pydoc_data.topics`,
    without code, grammar and tables; none is in both texts. They differ between versions of Python, so compare
    perplexities on them only within one version.

    Returns:
        The calibration text, some 200 kB, and the evaluation text, some 50 kB.

    Raises:
        CalibrationError: this Python lacks its documentation topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError(
            "this Python was installed without its documentation topics (pydoc_data), which the demo takes its text "
            "from: install the full standard library, or give a text file of your own"
        ) from error
    # A topic is often printed in another one as well: a paragraph counts where it comes first, in the evaluation text.
    order = sorted(topics, key=lambda name: (name not in _EVALUATION_TOPICS, name))
    seen: set[str] = set()
    evaluation: list[str] = []
    calibration: list[str] = []
    for name in order:
        paragraphs = [paragraph for paragraph in _prose(topics[name]) if paragraph not in seen]
        seen.update(paragraphs)
        (evaluation if name in _EVALUATION_TOPICS else calibration).extend(paragraphs)
    return _BETWEEN.join(calibration), _BETWEEN.join(evaluation)


_EVALUATION_TOPICS = frozenset(
    (
        "assignment",
        "attribute-access",
        "calls",
        "class",
        "comparisons",
        "execmodel",
        "import",
        "numeric-types",
        "objects",
    )
)
_NOT_PROSE = re.compile(
    r"^ {4}"  # indented: code, or the body of a description
    r"|^(\*{3}|={3}|-{3}|~{3}|\+-|\|)"  # underlined heading, table
    r"|::=|>>>",  # grammar, interpreter session
    re.MULTILINE,
)
_MARKUP = re.compile(r"\*{1,2}([^*\s][^*]*)\*{1,2}|``([^`]+)``")


def _prose(topic: str) -> list[str]:
    """Paragraphs of whole sentences in a topic, each on one line."""
    blocks = [block for block in re.split(r"\n\s*\n", topic) if not _NOT_PROSE.search(block)]
    lines = [" ".join(block.split()).removeprefix("* ") for block in blocks]
    plain = [_MARKUP.sub(lambda found: found[1] or found[2], line) for line in lines]
    return [line for line in plain if len(line) >= _SHORTEST_PARAGRAPH and line.endswith((".", "!", "?", ":"))]
