from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slimgraph import corpora, hub, text
from slimgraph.errors import CalibrationError

SENTENCE = "the old cat sits under a tree.\n"  # 9 tokens


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(SENTENCE * 50, encoding="utf-8")
    return path


def test_a_file_is_one_stream(prose: Path, tiny_tokenizer: Any) -> None:
    tokens = text.read_tokens(prose, tiny_tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == tiny_tokenizer(SENTENCE)["input_ids"] * 50
    assert text.read_tokens(str(prose), tiny_tokenizer).equal(tokens)


def test_limit_takes_the_start(prose: Path, tiny_tokenizer: Any) -> None:
    whole = text.read_tokens(prose, tiny_tokenizer)
    assert text.read_tokens(prose, tiny_tokenizer, limit=20).equal(whole[:20])
    assert text.read_tokens(prose, tiny_tokenizer, limit=10_000).equal(whole)
    assert text.read_text(prose, limit=45) == SENTENCE  # at the end of a line
    assert text.read_text(prose, limit=10) == SENTENCE[:10]


def test_a_limit_is_reached_in_text_of_long_lines(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "long.txt"
    path.write_text("sits " * 120 + "\n" + "sits " * 300, encoding="utf-8")
    whole = text.read_tokens(path, tiny_tokenizer)
    for limit in (120, 122, 128, 150, 200):
        assert text.read_tokens(path, tiny_tokenizer, limit=limit).equal(whole[:limit])


@pytest.mark.parametrize("given", ["the old cat " * 40, "老" * 360, "the cat " * 10_000, "~5 cats sit"])
def test_what_no_file_can_be_called_is_a_text(given: str, tiny_tokenizer: Any) -> None:
    assert not text.is_source(given)
    assert text.calibration_tokens(given, tiny_tokenizer, samples=1, seq_len=1).numel() == 1
    if not given.startswith("~"):
        with pytest.raises(CalibrationError, match="does not exist"):
            text.read_text(Path(given))


def test_several_texts_are_joined_by_empty_lines(tiny_tokenizer: Any) -> None:
    assert text.tokenize(["cat", "dog"], tiny_tokenizer).equal(text.tokenize("cat\n\ndog", tiny_tokenizer))
    for empty in ("", [], "  "):
        with pytest.raises(CalibrationError, match="no tokens"):
            text.tokenize(empty, tiny_tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no text"), (b" \n\n", "no text"), (b"\xff\xfe\x00", "not UTF-8 text: byte 0xff"), (b"a\0b", "binary file")],
)
def test_files_without_text(tmp_path: Path, tiny_tokenizer: Any, content: bytes, message: str) -> None:
    path = tmp_path / "odd"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as raised:
        text.read_tokens(path, tiny_tokenizer)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/no/such/file", Path("missing")])
def test_missing_files(tiny_tokenizer: Any, source: str | Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        text.read_tokens(source, tiny_tokenizer)


def test_a_directory_is_no_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="is not a file"):
        text.read_tokens(tmp_path, tiny_tokenizer)


def test_an_unreachable_data_set_is_told_at_once(tiny_tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="neither a text file here nor a data set") as raised:
        text.read_tokens("somebody/books:small@test", tiny_tokenizer)
    assert "the hub cannot be reached" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Puts a data set of three rows in place of every data set; collects what was asked for."""
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        column = "body" if name == "odd" else "text"
        rows = datasets.Dataset.from_dict({column: ["a cat", "a dog", "a tree"]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_data_set_gives_its_text_column(asked: list[tuple[Any, ...]], tiny_tokenizer: Any) -> None:
    assert text.read_text("books") == "a cat\n\na dog\n\na tree"
    assert text.read_text("somebody/books:small@test") == "a cat\n\na dog\n\na tree"
    assert asked == [("books", None, "train", False), ("somebody/books", "small", "test", False)]


def test_a_limited_data_set_is_streamed(asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert text.read_text("books", limit=10) == "a cat\n\n"
    assert asked == [("books", None, "train", True)]


def test_a_data_set_without_text_names_its_columns(asked: list[tuple[Any, ...]]) -> None:
    with pytest.raises(CalibrationError, match="no column 'text', found 'body'"):
        text.read_text("odd")


def test_windows_drop_the_tail() -> None:
    tokens = torch.arange(10)
    assert text.windows(tokens, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert text.windows(tokens, 10).tolist() == [list(range(10))]
    with pytest.raises(CalibrationError, match="10 tokens found, 11 needed"):
        text.windows(tokens, 11)


def test_a_calibration_batch_is_drawn_without_overlap() -> None:
    tokens = torch.arange(1000)
    batch = text.calibration_batch(tokens, samples=8, seq_len=16, seed=3)
    assert batch.shape == (8, 16)
    assert batch.dtype == torch.int64
    assert (batch[:, 1:] - batch[:, :-1] == 1).all()  # each window is a run of the stream
    assert (batch[:, 0] % 16 == 0).all()
    assert len(batch.unique()) == 8 * 16


def test_the_seed_decides_the_draw() -> None:
    tokens = torch.arange(1000)
    first = text.calibration_batch(tokens, samples=8, seq_len=16, seed=3)
    torch.manual_seed(99)  # the global generator has no part in it
    assert text.calibration_batch(tokens, samples=8, seq_len=16, seed=3).equal(first)
    assert not text.calibration_batch(tokens, samples=8, seq_len=16, seed=4).equal(first)


def test_too_short_a_text_says_by_how_much() -> None:
    with pytest.raises(CalibrationError, match="127 tokens found, 128 needed for 8 samples of 16"):
        text.calibration_batch(torch.arange(127), samples=8, seq_len=16, seed=0)
    with pytest.raises(CalibrationError, match="at least 1 sample"):
        text.calibration_batch(torch.arange(127), samples=0, seq_len=16, seed=0)


def test_demo_texts_are_long_plain_and_different() -> None:
    calibration, evaluation = text.demo_texts()
    assert len(calibration) > 100_000
    assert len(evaluation) > 35_000
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))
    for prose in (calibration, evaluation):
        assert ">>>" not in prose
        assert "****" not in prose
        assert min(map(len, prose.split("\n\n"))) >= 80
    assert text.demo_texts() == (calibration, evaluation)


class Marks:
    """Words to ids; puts what it is told before and after a text."""

    def __init__(self, before: list[int], after: list[int], bos: int | None) -> None:
        self.before, self.after, self.bos_token_id = before, after, bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [10 + ord(each) for each in text]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


@pytest.mark.parametrize(
    ("tokenizer", "auto", "always"),
    [
        (Marks([2], [], 2), [2], [2]),
        (Marks([], [], 5), [], [5]),
        (Marks([], [1], 5), [], [5]),  # an end-of-text token is none at the start
        (Marks([8, 9], [1], 9), [8, 9], [8, 9]),
    ],
)
def test_the_tokenizer_says_whether_windows_need_a_start(tokenizer: Any, auto: list[int], always: list[int]) -> None:
    assert text.start_tokens(tokenizer) == auto
    assert text.start_tokens(tokenizer, "always") == always
    assert text.start_tokens(tokenizer, "never") == []


def test_no_start_token_to_be_had() -> None:
    with pytest.raises(CalibrationError, match="has no start-of-text token"):
        text.start_tokens(Marks([], [], None), "always")
    with pytest.raises(CalibrationError, match="'perhaps'; expected one of auto, always, never"):
        text.start_tokens(Marks([], [], None), "perhaps")


def test_windows_begin_with_the_start() -> None:
    rows = text.windows(torch.arange(10), 4, start=[99])
    assert rows.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    with pytest.raises(CalibrationError, match="no room"):
        text.windows(torch.arange(10), 1, start=[99])


def test_texts_are_mixed_evenly_and_a_single_one_is_drawn_as_ever(tmp_path: Path) -> None:
    letters: Any = Marks([], [], None)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "in three words.txt"]
    for path, letter in zip(paths, "abc", strict=True):
        path.write_text(letter * 300, encoding="utf-8")
    places = [str(p) for p in paths]
    drawn = text.mixed_tokens(places, letters, samples=8, seq_len=16, seed=3)
    assert drawn.shape == (8, 16)
    assert (drawn == drawn[:, :1]).all()
    counts = torch.bincount(drawn[:, 0] - 10 - ord("a")).tolist()
    assert counts == [3, 3, 2]
    assert drawn[:, 0].tolist() != sorted(drawn[:, 0].tolist())
    assert drawn.equal(text.mixed_tokens(places, letters, samples=8, seq_len=16, seed=3))
    paths[0].write_text("".join(map(chr, range(200, 500))), encoding="utf-8")
    alone = text.mixed_tokens(places[:1], letters, samples=4, seq_len=16, seed=3)
    assert alone.equal(text.calibration_tokens(paths[0], letters, samples=4, seq_len=16, seed=3))
    message = "2 calibration windows cannot be drawn from 3 texts; draw more"
    with pytest.raises(CalibrationError, match=f"^{message}$"):
        text.mixed_tokens(places, letters, samples=2, seq_len=16)


def test_calibration_windows_begin_as_the_tokenizer_begins_a_text() -> None:
    drawn = text.calibration_tokens(["abc" * 20], Marks([2], [], 2), samples=3, seq_len=8)  # type: ignore[arg-type]
    assert drawn.shape == (3, 8)
    assert (drawn[:, 0] == 2).all()
    assert (drawn[:, 1:] > 9).all()
    bare = text.calibration_tokens(["abc" * 20], Marks([2], [], 2), samples=7, seq_len=8, bos="never")  # type: ignore[arg-type]
    assert (bare[:, 0] == 2).sum() <= 1


def test_short_names_are_known_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool, **options: Any) -> Any:
        asked.append((name, config, split, streaming, options))
        return datasets.Dataset.from_dict({"text": ["a cat", "a dog"], "sentence": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(corpora.hub, "reachable", lambda: True)
    assert text.read_text("wikitext2") == "a cat\n\na dog"
    assert text.read_text("ptb") == "one\n\ntwo"
    text.read_text("c4")
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False, {})
    assert asked[1][:3] == ("ptb-text-only/ptb_text_only", "penn_treebank", "validation")
    assert asked[2][0] == "allenai/c4"
    assert asked[2][2:4] == ("validation", True)


def test_a_short_name_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ptb").write_text("my own text")
    monkeypatch.chdir(tmp_path)
    assert text.read_text("ptb") == "my own text"
