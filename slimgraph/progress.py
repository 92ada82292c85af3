"""Progress of long work, and how long each stage took.

The library is quiet: progress shows only where the caller passes `Progress(enabled=True)`, as the command line does.
Work that ends within two seconds never shows.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

__all__ = ["SILENT", "Progress", "Stopwatch", "Tick"]

_SHOW_AFTER = 2.0  # seconds
_LINE_EVERY = 10.0  # seconds at least between plain lines, and a tenth of the work...
_LINE_ANYWAY = 60.0  # ... or that many seconds, however little was done

_log = logging.getLogger(__name__)


class Tick:
    """Counts the steps of a stage: `tick()` for one, `tick(n)` for several. This one shows nothing."""

    def __init__(self, stage: str, total: int | None = None) -> None:
        self.stage = stage
        self.total = total
        self.done = 0

    def __call__(self, steps: int = 1) -> None:
        """Count `steps` more."""
        self.done += steps


class Progress:
    """Shows running stages on standard error: bars with an estimate on a terminal, a few plain lines elsewhere.

    Example:
        >>> progress = Progress(enabled=False)
        >>> with progress("calibrate", total=2) as tick:
        ...     tick()
        ...     tick()

    Args:
        enabled: show anything at all.
        stream: where, standard error by default. It is looked up here, once: redirecting `sys.stderr` afterwards does
            not catch the progress.
        show_after: seconds that a stage lasts before it shows.
    """

    def __init__(self, *, enabled: bool = False, stream: TextIO | None = None, show_after: float = _SHOW_AFTER) -> None:
        self.enabled = enabled
        self._show_after = show_after
        self._stream = stream or sys.stderr
        console = Console(file=self._stream)
        self._bars = _Bars(console) if enabled and console.is_terminal else None

    @contextmanager
    def __call__(self, stage: str, total: int | None = None) -> Iterator[Tick]:
        """Show `stage` for as long as the context lasts. Stages nest.

        Args:
            stage: what is being done, in a word or two.
            total: number of steps, or None where nobody knows.

        Yields:
            What to call after each step.
        """
        if not self.enabled:
            yield Tick(stage, total)
            return
        tick = _BarTick(stage, total, self._bars) if self._bars else _LineTick(stage, total, self._stream)
        timer = threading.Timer(self._show_after, tick.show)  # shows a stage that takes long over its first step, too
        timer.daemon = True
        timer.start()
        try:
            yield tick
        finally:
            timer.cancel()
            tick.close()


class Stopwatch:
    """Collects the seconds of each stage, in order; a stage that runs again adds up.

    Example:
        >>> watch = Stopwatch()
        >>> with watch("trace"):
        ...     pass
        >>> list(watch.stages())
        ['trace']
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._own: dict[str, float] = {}
        self._open: list[str] = []
        self._outer: dict[str, str] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time `stage` while the context lasts, and log it at INFO; at DEBUG inside another stage."""
        self._seconds.setdefault(stage, 0.0)
        if self._open:
            self._outer[stage] = self._open[-1]
        self._open.append(stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._open.pop()
            self._seconds[stage] += seconds
            self._own[stage] = self._own.get(stage, 0.0) + seconds
            if self._open:
                self._own[self._open[-1]] = self._own.get(self._open[-1], 0.0) - seconds
            _log.log(logging.DEBUG if self._open else logging.INFO, "%s: %.2f s", stage, seconds)

    def stages(self) -> dict[str, float]:
        """Seconds of each stage, in the order in which the stages began."""
        return dict(self._seconds)

    def own(self) -> dict[str, float]:
        """Seconds of each stage without those of the stages inside it; they add up to the whole."""
        return dict(self._own)

    def outer(self) -> dict[str, str]:
        """For each stage that ran inside another one: which; its seconds are among that one's."""
        return dict(self._outer)


class _Bars:
    """The bars of one terminal: drawn while at least one stage is shown."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rich: RichProgress | None = None

    def add(self, tick: Tick) -> TaskID:
        if self._rich is None:
            self._rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._rich.start()
        return self._rich.add_task(tick.stage, total=tick.total, completed=tick.done)

    def update(self, task: TaskID, done: int) -> None:
        if self._rich is not None:
            self._rich.update(task, completed=done)

    def remove(self, task: TaskID) -> None:
        if self._rich is None:
            return
        self._rich.remove_task(task)
        if not self._rich.task_ids:
            self._rich.stop()
            self._rich = None


class _BarTick(Tick):
    """A stage with a bar. The lock keeps the timer that shows it from meeting the end of the stage."""

    def __init__(self, stage: str, total: int | None, bars: _Bars) -> None:
        super().__init__(stage, total)
        self._bars = bars
        self._lock = threading.Lock()
        self._closed = False
        self._task: TaskID | None = None

    def __call__(self, steps: int = 1) -> None:
        self.done += steps
        if self._task is not None:
            self._bars.update(self._task, self.done)

    def show(self) -> None:
        with self._lock:
            if not self._closed:
                self._task = self._bars.add(self)
                self._bars.update(self._task, self.done)  # steps taken meanwhile

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._task is not None:
                self._bars.remove(self._task)


class _LineTick(Tick):
    """A stage that writes a plain line now and then, for logs."""

    def __init__(self, stage: str, total: int | None, stream: TextIO) -> None:
        super().__init__(stage, total)
        self._stream = stream
        self._lock = threading.Lock()
        self._closed = False
        self._start = time.monotonic()
        self._line_at: float | None = None  # when the last line was written, None before the first
        self._line_done = 0

    def __call__(self, steps: int = 1) -> None:
        self.done += steps
        if self._line_at is None:
            return
        waited = time.monotonic() - self._line_at
        advanced = self.total is not None and self.done - self._line_done >= self.total / 10
        if waited >= _LINE_ANYWAY or (waited >= _LINE_EVERY and advanced):
            self._write(self._status())

    def show(self) -> None:
        with self._lock:
            if not self._closed:
                self._write(self._status())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._line_at is not None:
                self._write(f"{self.stage}: {_duration(time.monotonic() - self._start)} in all")

    def _status(self) -> str:
        if self.total is None:
            return f"{self.stage} ..." if not self.done else f"{self.stage}: {self.done}"
        if not self.done:
            return f"{self.stage}: 0/{self.total}"
        left = (time.monotonic() - self._start) / self.done * (self.total - self.done)
        return f"{self.stage}: {self.done}/{self.total}, about {_duration(left)} left"

    def _write(self, text: str) -> None:
        self._line_at = time.monotonic()
        self._line_done = self.done
        self._stream.write(text + "\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    """The duration for people: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


SILENT = Progress(enabled=False)
"""Shows nothing: for `progress or SILENT` in functions with an optional progress."""
