"""Progress: bars on a terminal that end full, plain lines elsewhere, nothing when quiet. Clocks are given."""

import contextlib
import io
import os
import re
import signal
import time

import pytest

from transmla.cli.frame import errors
from transmla.cli.progress import Lines, duration, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines() -> tuple[Lines, Clock, list[str]]:
    said: list[str] = []
    clock = Clock()
    return Lines(said.append, clock), clock, said


def test_a_stage_has_a_line_when_it_begins_and_when_it_ends(lines: tuple[Lines, Clock, list[str]]) -> None:
    made, clock, said = lines
    made.update("tokens", 0, 1, "wikitext")
    clock.now += 3
    made.update("tokens", 1, 1, "4,096 tokens")
    made.update("tokens", 1, 1, "4,096 tokens")
    assert said == ["tokens: wikitext", "tokens: 1/1 in 3 s, 4,096 tokens"]


def test_a_long_stage_has_a_line_a_minute(lines: tuple[Lines, Clock, list[str]]) -> None:
    made, clock, said = lines
    for done in range(1, 31):
        made.update("convert layers", done, 30, f"layer {done}")
        clock.now += 13
    assert said[0] == "convert layers: layer 1" and said[-1] == "convert layers: 30/30 in 6 min 17 s, layer 30"
    # every fifth layer, until the last one
    assert said[1] == "convert layers: 6/30, 1 min 5 s, about 5 min 12 s left, layer 6" and len(said) == 2 + 5


def test_a_step_without_progress_is_reported(lines: tuple[Lines, Clock, list[str]]) -> None:
    made, clock, said = lines
    made.beat()
    made.update("verify", 0, 2, "")
    for _ in range(5):
        clock.now += 30
        made.beat()
    assert said == ["verify", "verify: 0/2, 1 min 0 s", "verify: 0/2, 2 min 0 s"]


def test_a_resumed_stage_does_not_count_what_was_there(lines: tuple[Lines, Clock, list[str]]) -> None:
    made, clock, said = lines
    made.update("distil", 80, 100, "")
    clock.now += 100
    made.update("distil", 90, 100, "")
    assert said[-1] == "distil: 90/100, 1 min 40 s, about 1 min 40 s left"


def test_a_stage_that_goes_on_after_another_has_a_line(lines: tuple[Lines, Clock, list[str]]) -> None:
    made, _, said = lines
    for done in range(3):
        made.update("try latents", done, 3, f"rank {done}")
        made.update("measure", 1, 1, "")
    made.update("try latents", 3, 3, "rank 2")
    stages = [line for line in said if line.startswith("try latents")]
    assert [line.split(", ")[0] for line in stages] == [
        "try latents: rank 0", "try latents: 1/3", "try latents: 2/3", "try latents: 3/3 in 0 s",
    ]  # fmt: skip
    assert [line.rpartition("rank ")[2] for line in stages] == ["0", "1", "2", "2"]


def test_a_stage_that_starts_again_is_a_new_one(lines: tuple[Lines, Clock, list[str]]) -> None:
    made, _, said = lines
    for _ in range(2):
        made.update("convert layers", 1, 2, "")
        made.update("convert layers", 2, 2, "")
    assert said == 2 * ["convert layers", "convert layers: 2/2 in 0 s"]


def test_no_terminal_no_control_characters() -> None:
    stream = io.StringIO()
    with progress(False, stream) as update:
        assert update is not None
        update("write", 1, 2, "")
        update("write", 2, 2, "")
    assert re.fullmatch(r"write\nwrite: 2/2 in \d+ s\n", stream.getvalue())


def test_bars_end_full_unless_something_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with progress(False, stream) as update:
        assert update is not None
        update("hash source", 0, 1, "")
    assert "1/1" in stream.getvalue()[stream.getvalue().rindex("hash source") :]
    broken = Terminal()
    with pytest.raises(KeyboardInterrupt), progress(False, broken) as update:
        assert update is not None
        update("hash source", 0, 1, "")
        raise KeyboardInterrupt
    assert "1/1" not in broken.getvalue()


def test_quiet_is_quiet() -> None:
    stream = io.StringIO()
    with progress(True, stream) as update:
        update("work", 1, 2, "")
    assert not stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize("quiet", [True, False])
def test_a_signal_that_was_lost_is_heeded_at_the_next_step(quiet: bool) -> None:
    """Exceptions in finalisers and in callbacks of libraries go nowhere; a scheduler sends its signal once."""

    class Last:
        def __del__(self) -> None:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)  # until the handler has run

    seen = []
    with pytest.raises(SystemExit) as ended, errors(), progress(quiet, io.StringIO()) as update:
        for step in range(3):
            seen.append(step)
            if step == 1:
                Last()
            update("work", step, 3, "")
    assert ended.value.code == 143 and seen == [0, 1]
    with progress(quiet, io.StringIO()) as update:
        update("work", 1, 3, "")
