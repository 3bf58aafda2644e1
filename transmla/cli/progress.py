"""Progress on stderr: bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from transmla.cli.frame import heed
from transmla.progress import Progress, silent

# seconds between two lines of one stage
EVERY = 60.0


@contextmanager
def progress(quiet: bool, stream: TextIO | None = None) -> Iterator[Progress]:
    """A progress callback that writes to `stream` (default: stderr), or nothing when quiet, and heeds signals.

    On a terminal every stage has a bar, and all bars are full when the work has ended. Anywhere else a stage has a line
    when it begins, one when it goes on after another, one a minute while it lasts, and one when it ends.
    """
    stream = stream or sys.stderr
    if quiet:
        yield _heeding(silent)
    elif Console(file=stream).is_terminal:
        with _bars(stream) as update:
            yield _heeding(update)
    else:
        lines = Lines(lambda line: print(line, file=stream, flush=True))
        with lines.watched():
            yield _heeding(lines.update)


def _heeding(update: Progress) -> Progress:
    def heeding(stage: str, done: int, total: int, remark: str) -> None:
        heed()
        update(stage, done, total, remark)

    return heeding


@contextmanager
def _bars(stream: TextIO) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.completed:>4}/{task.total:<4}"))
    clocks = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("[dim]{task.fields[remark]}"))
    with Bars(*columns, *clocks, console=Console(file=stream)) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, remark: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, remark=remark)
            bars.update(tasks[stage], completed=done, total=total, remark=remark)

        yield update
        # only if nothing went wrong
        for task in bars.tasks:
            bars.update(task.id, completed=task.total)


@dataclass
class _Stage:
    """began: when, in seconds;  first: units that were done then, more than none where a run was resumed"""

    began: float
    first: int
    done: int
    total: int
    remark: str
    ended: bool = False


class Lines:
    """Progress as plain lines, without control characters.

    write: takes one line;  clock: seconds, from any start
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic, every: float = EVERY
    ) -> None:
        self._write, self._clock, self._every = write, clock, every
        self._stages: dict[str, _Stage] = {}
        self._current: str | None = None
        self._spoken = clock()
        self._lock = threading.Lock()

    def update(self, stage: str, done: int, total: int, remark: str) -> None:
        """The `Progress` callback."""
        with self._lock:
            now = self._clock()
            known = self._stages.get(stage)
            if known is None or done < known.done:
                known = self._stages[stage] = _Stage(now, done, done, total, remark)
                self._say(stage + (f": {remark}" if remark else ""), now)
            returned = known.done < done < total and self._current != stage
            known.done, known.total, known.remark = done, total, remark
            self._current = stage
            if done >= total and not known.ended:
                known.ended = True
                words = [f"{stage}: {done:,}/{total:,} in {duration(now - known.began)}", remark]
                self._say(", ".join(filter(None, words)), now)
            elif returned or now - self._spoken >= self._every:
                self._say(self._state(now), now)

    def beat(self) -> None:
        """Say how the current stage stands, if nothing has been said for a while."""
        with self._lock:
            now = self._clock()
            if self._current is not None and now - self._spoken >= self._every:
                self._say(self._state(now), now)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While it lasts, a long step without any progress is reported as well."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                self.beat()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _state(self, now: float) -> str:
        assert self._current is not None
        stage = self._stages[self._current]
        elapsed = now - stage.began
        words = [f"{self._current}: {stage.done:,}/{stage.total:,}, {duration(elapsed)}"]
        if stage.done > stage.first and not stage.ended:
            left = elapsed * (stage.total - stage.done) / (stage.done - stage.first)
            words.append(f"about {duration(left)} left")
        return ", ".join(filter(None, [*words, stage.remark]))

    def _say(self, line: str, now: float) -> None:
        self._write(line)
        self._spoken = now


def duration(seconds: float) -> str:
    """8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
