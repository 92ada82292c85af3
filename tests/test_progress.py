from __future__ import annotations

import io
import itertools
import logging
import os
import subprocess
import sys
import time

import pytest

from slimgraph import progress as module
from slimgraph.progress import SILENT, Progress, Stopwatch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_library_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with SILENT("calibrate", total=2) as tick:
        tick()
        tick()
    assert tick.done == 2
    assert capfd.readouterr() == ("", "")


def test_it_is_imported_on_a_terminal() -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", "from slimgraph.progress import Progress; Progress(enabled=True)"]
    done = subprocess.run(command, stderr=theirs, check=False)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_short_stages_do_not_show(stream: io.StringIO) -> None:
    with Progress(enabled=True, stream=stream)("calibrate", total=2) as tick:
        tick(2)
    assert stream.getvalue() == ""


def test_a_terminal_shows_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = Progress(enabled=True, stream=stream, show_after=0)
    with progress("outer", total=10) as outer, progress("inner") as inner:
        outer(4)
        time.sleep(0.3)
        inner()
    assert "outer" in stream.getvalue()
    assert "inner" in stream.getvalue()
    assert "4/10" in stream.getvalue()


def test_a_log_gets_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=1.0)  # every look at the clock is a second later
    stream = io.StringIO()
    with Progress(enabled=True, stream=stream, show_after=0)("calibrate", total=1000) as tick:
        time.sleep(0.3)
        monkeypatch.setattr(module.time, "monotonic", lambda: time.perf_counter() + next(clock))
        for _ in range(1000):
            tick()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "calibrate: 0/1000"
    assert lines[-1].startswith("calibrate: ")
    assert lines[-1].endswith(" in all")
    assert "1000, about " in lines[1]
    assert 8 <= len(lines) <= 24


def test_an_error_ends_the_stage() -> None:
    stream = Terminal()
    with (
        pytest.raises(KeyError),
        Progress(enabled=True, stream=stream, show_after=0)("calibrate", total=1),
    ):
        raise KeyError
    shown = stream.getvalue()
    time.sleep(0.1)
    assert stream.getvalue() == shown


def test_the_stopwatch_keeps_the_order_and_adds_up(caplog: pytest.LogCaptureFixture) -> None:
    watch = Stopwatch()
    with caplog.at_level(logging.INFO, logger="slimgraph"):
        with watch("trace"):
            time.sleep(0.01)
        with watch("plan"):
            pass
        with watch("trace"):
            time.sleep(0.01)
    assert list(watch.stages()) == ["trace", "plan"]
    assert watch.stages()["trace"] >= 0.02
    assert [record.message.split(":")[0] for record in caplog.records] == ["trace", "plan", "trace"]


@pytest.mark.parametrize(("seconds", "text"), [(8.4, "8 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert module._duration(seconds) == text
