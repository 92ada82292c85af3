"""Text for calibration and evaluation: from a file, a data set or the Python documentation, to tokens, to windows.

A text is tokenised as one stream. Calibration draws windows from it at random, evaluation takes all in order.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from slimgraph import corpora
from slimgraph.corpora import BETWEEN
from slimgraph.errors import CalibrationError

__all__ = [
    "BOS_MODES",
    "Tokenizer",
    "calibration_batch",
    "calibration_tokens",
    "demo_texts",
    "is_source",
    "mixed_tokens",
    "read_text",
    "read_tokens",
    "start_tokens",
    "tokenize",
    "windows",
]

BOS_MODES = ("auto", "always", "never")

_SHORTEST_PARAGRAPH = 80  # characters of a paragraph that counts as prose
_TEXT_SUFFIXES = {".csv", ".json", ".jsonl", ".log", ".md", ".parquet", ".rst", ".text", ".txt"}
_FEWEST_TOKENS = 2**20  # of a calibration text that windows are drawn from, where it has so many
_CHARACTERS_PER_TOKEN = 16  # at most, nearly always: how much text is read for a limited number of tokens


class Tokenizer(Protocol):
    """What is used of a tokenizer: a call with the text that returns `input_ids`."""

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenise `text`."""


def read_tokens(source: str | Path, tokenizer: Tokenizer, *, limit: int | None = None, special: bool = True) -> Tensor:
    """Read text and tokenise it as one stream.

    Args:
        source: see `read_text`.
        tokenizer: of the model.
        limit: at most so many tokens, from the start; a large data set is then not downloaded whole.
        special: add special tokens once, as the tokenizer does to any text; without, the stream is the text alone.

    Returns:
        (n,) int64 token ids.

    Raises:
        CalibrationError: the source is missing, empty, not text, or cannot be reached.
    """
    text = read_text(source, limit=None if limit is None else limit * _CHARACTERS_PER_TOKEN)
    tokens = tokenize(text, tokenizer, special=special)
    return tokens if limit is None else tokens[:limit]


def read_text(source: str | Path, *, limit: int | None = None) -> str:
    """Read text from a file or from a data set of the hub.

    Args:
        source: path of a UTF-8 text file; a short name of `slimgraph.corpora.NAMED`, like `wikitext2`; or
            `name[:config][@split]` of a data set as `datasets` knows it. Of the last the column `text` is taken and the
            split is `train` unless said. Rows are joined by empty lines.
        limit: at most so many characters, from the start, cut at the end of a line where there is one; a data set is
            then streamed, not downloaded whole.

    Raises:
        CalibrationError: the source is missing, empty, not text, or cannot be reached.
    """
    path = Path(source).expanduser()
    text = _read_file(path) if _is_path(source, path) else corpora.read(str(source), limit)
    if not text.strip():
        raise CalibrationError(f"no text in {source}: expected some lines of plain text, found none")
    return text if limit is None else _cut(text, limit)


def tokenize(text: str | list[str], tokenizer: Tokenizer, *, special: bool = True) -> Tensor:
    """Tokenise as one stream.

    Args:
        text: a text, or several, which are joined by empty lines.
        tokenizer: of the model.
        special: add special tokens, as the tokenizer does to any text.

    Returns:
        (n,) int64 token ids.

    Raises:
        CalibrationError: there is no text, or the tokenizer makes no tokens of it.
    """
    whole = text if isinstance(text, str) else BETWEEN.join(text)
    # Not in pieces: where a piece ends, some tokenizers merge differently.
    options = {} if special else {"add_special_tokens": False}
    ids = tokenizer(whole, verbose=False, **options)["input_ids"] if whole else []
    if not ids:
        raise CalibrationError(f"no tokens in a text of {len(whole)} characters: expected plain text that is not empty")
    return torch.tensor(ids, dtype=torch.int64)


def start_tokens(tokenizer: Any, bos: str = "auto") -> list[int]:
    """The start-of-text tokens that stand before every window.

    Some models were never trained on text without one, and make nonsense of it. Their tokenizers add one to any text
    by themselves, and that is what "auto" goes by.

    Args:
        tokenizer: of the model.
        bos: "auto": what the tokenizer puts before a text by itself, often nothing; "always": that, or else its
            start-of-text token; "never": nothing.

    Returns:
        Token ids, none or one as a rule.

    Raises:
        CalibrationError: `bos` is none of these, or the tokenizer has no start-of-text token to add always.
    """
    if bos not in BOS_MODES:
        raise CalibrationError(f"bos is {bos!r}; expected one of {', '.join(BOS_MODES)}")
    if bos == "never":
        return []
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    added = [int(each) for each in whole[: starts[0]]] if bare and starts else []
    if added or bos == "auto":
        return added
    own = getattr(tokenizer, "bos_token_id", None)
    if own is None:
        raise CalibrationError(
            "bos is 'always', and this tokenizer has no start-of-text token; expected one: use 'auto' or 'never'"
        )
    return [int(own)]


def calibration_tokens(
    text: str | Path | Sequence[str],
    tokenizer: Tokenizer,
    *,
    samples: int = 32,
    seq_len: int = 128,
    seed: int = 0,
    bos: str = "auto",
) -> Tensor:
    """Calibration windows from a text or from where it lies.

    Args:
        text: a text or several; or the path of a text file or the name of a data set, see `read_text`. A string with
            white space in it that is no file is a text.
        tokenizer: of the model.
        samples: number of windows. Of a very long text only the first part is drawn from: a million tokens, or 64 times
            as many as are drawn.
        seq_len: tokens per window, start-of-text tokens counted.
        seed: of the draw.
        bos: whether every window begins with a start-of-text token, see `start_tokens`.

    Returns:
        (samples, seq_len) int64.

    Raises:
        CalibrationError: the text is missing, empty or too short.
    """
    start = start_tokens(tokenizer, bos)
    if isinstance(text, Path) or (isinstance(text, str) and is_source(text)):
        limit = max(_FEWEST_TOKENS, 64 * samples * seq_len)
        tokens = read_tokens(text, tokenizer, limit=limit, special=not start)
    else:
        tokens = tokenize(text if isinstance(text, str) else list(text), tokenizer, special=not start)
    return calibration_batch(tokens, samples=samples, seq_len=seq_len, seed=seed, start=start)


def mixed_tokens(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    samples: int = 32,
    seq_len: int = 128,
    seed: int = 0,
    bos: str = "auto",
) -> Tensor:
    """Calibration windows from where texts lie, as many of each text as of any other, in random order.

    Args:
        sources: paths of text files or names of data sets, see `read_text`; without any, the prose of the Python
            language reference.
        tokenizer: of the model.
        samples: number of windows of all texts together; where they cannot be shared evenly, the first have one more.
        seq_len: tokens per window, start-of-text tokens counted.
        seed: of the draw and of the order.
        bos: whether every window begins with a start-of-text token, see `start_tokens`.

    Returns:
        (samples, seq_len) int64.

    Raises:
        CalibrationError: a text is missing, empty or too short, or there are more texts than windows.
    """
    if len(sources) > samples:
        raise CalibrationError(f"{samples} calibration windows cannot be drawn from {len(sources)} texts; draw more")
    # A path where it has spaces: nobody gives the text itself here.
    places: list[Any] = [Path(s) if any(map(str.isspace, s)) else s for s in sources] or [[demo_texts()[0]]]
    each, more = divmod(samples, len(places))
    parts = [
        calibration_tokens(place, tokenizer, samples=each + (i < more), seq_len=seq_len, seed=seed, bos=bos)
        for i, place in enumerate(places)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.randperm(samples, generator=torch.Generator().manual_seed(seed))]


def is_source(text: str) -> bool:
    """Whether a string says where a text lies, and is not one itself."""
    words = text.split()
    if not words or "\n" in text.strip() or not _can_be_path(text):
        return False
    return len(words) == 1 or Path(text).expanduser().is_file()


def calibration_batch(tokens: Tensor, *, samples: int, seq_len: int, seed: int, start: Sequence[int] = ()) -> Tensor:
    """Draw windows that do not overlap, at random.

    Args:
        tokens: (n,) int64, one stream.
        samples: number of windows.
        seq_len: tokens per window, those of `start` counted.
        seed: of the draw; the same seed draws the same windows from the same stream.
        start: tokens that stand before every window.

    Returns:
        (samples, seq_len) int64, in the order drawn.

    Raises:
        CalibrationError: the stream is shorter than `samples * seq_len`.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"calibration needs at least 1 sample of 1 token, not {samples} of {seq_len}")
    needed = samples * (seq_len - len(start))
    if len(tokens) < needed:
        raise CalibrationError(
            f"the calibration text is too short: {len(tokens)} tokens found, {needed} needed for {samples} samples of "
            f"{seq_len}; give a longer text or ask for fewer or shorter samples"
        )
    rows = windows(tokens, seq_len, start=start)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[drawn[:samples]]


def windows(tokens: Tensor, seq_len: int, *, start: Sequence[int] = ()) -> Tensor:
    """Cut a stream into windows without overlap, dropping the tail.

    Args:
        tokens: (n,) int64, one stream.
        seq_len: tokens per window, those of `start` counted.
        start: tokens that stand before every window.

    Returns:
        (n // (seq_len - len(start)), seq_len) int64, at least one row; a view of `tokens` when `start` is empty.

    Raises:
        CalibrationError: the stream is shorter than one window, or the window too short for `start`.
    """
    length = seq_len - len(start)
    if length < 1:
        raise CalibrationError(
            f"windows of {seq_len} tokens have no room for text beside {len(start)} start-of-text tokens; ask for "
            "longer windows"
        )
    count = len(tokens) // length
    if count == 0:
        raise CalibrationError(
            f"the text is too short: {len(tokens)} tokens found, {length} needed for one window; give a longer text "
            "or ask for shorter windows"
        )
    rows = tokens[: count * length].view(count, length)
    return rows if not start else torch.cat([tokens.new_tensor([list(start)]).expand(count, -1), rows], dim=1)


def _can_be_path(text: str) -> bool:
    """Whether a file could be called so: a path has a longest length, and so has each name in it."""
    try:
        Path(text).expanduser().exists()
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except RuntimeError:  # no such user
        return False
    return True


def _is_path(source: str | Path, path: Path) -> bool:
    """Whether a path is meant rather than a data set. A data set's name has one slash at most and no file suffix."""
    if isinstance(source, Path) or path.exists():
        return True
    return path.suffix.lower() in _TEXT_SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1


def _read_file(path: Path) -> str:
    if not _can_be_path(str(path)) or not path.exists():
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
    return BETWEEN.join(calibration), BETWEEN.join(evaluation)


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
