"""Whatever happens to the disk or the process: the finished folder, or a clear error and the same command goes on.

Beside `-m slow`, which tries every operation, only some are tried; docs/reliability.md has the counts of all.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conversion.faults import digest
from transmla.checkpoint.shards import BUFFER_BYTES

CHECKOUT = Path(__file__).parents[2]
# exit codes of errors.py that a failing disk may end in
CLEAR = {"done", "DestinationError 8", "SourceError 3", "DataError 7"}
ACTIONS = ("kill", "full", "broken", "denied")


def tried(folder: Path, *wanted: str) -> list[dict[str, Any]]:
    """The points that faults.py has tried, each with its scenario and action."""
    command = [sys.executable, "-m", "tests.conversion.faults", str(folder), *wanted]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, heading = [], {}
    for line in map(json.loads, filter(None, done.stdout.splitlines())):
        if "action" in line:
            heading = line
        else:
            found.append(heading | line)
    return found


def check(points: list[dict[str, Any]]) -> None:
    for point in points:
        assert point["again"] in ("resumed", "was complete"), point
        assert point["result"] == "killed" if point["action"] == "kill" else point["result"] in CLEAR, point


def test_some_operations_fail_or_are_the_last(tmp_path: Path) -> None:
    points = tried(
        tmp_path, "kill:convert:2:9", "kill:convert:-13:3", "full:convert:3:19", "kill:export:0:3", "broken:export:1:6"
    )
    check(points)
    assert {point["result"] for point in points} >= {"killed", "DestinationError 8", "SourceError 3"}
    # the kill behind the final rename leaves a folder that is complete, and the next command clears it
    assert {point["again"] for point in points if point["action"] == "kill"} == {"resumed", "was complete"}


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("scenario", ["convert", "stream", "export", "unfold"])
def test_every_operation(tmp_path: Path, scenario: str, action: str) -> None:
    points = tried(tmp_path, f"{action}:{scenario}:0:1")
    check(points)
    assert len(points) == points[0]["points"]
    # among them what is written, what is forced to the disk and the step that gives the result its name
    assert {point["at"].split()[0] for point in points} >= {"write", "fsync", "os.rename"}


@pytest.mark.slow
def test_heal(tmp_path: Path) -> None:
    """Its curve need not be the same bit by bit in principle; on one machine it is."""
    check(tried(tmp_path, "kill:heal:0:3", "full:heal:1:5"))


@pytest.mark.slow
def test_two_hundred_kills_at_any_moment(tmp_path: Path) -> None:
    points = tried(tmp_path, "random:convert:200:0")
    assert len(points) == 200
    for point in points:
        assert point["result"] in ("killed", "exit 0") and point["again"] in ("resumed", "was complete"), point


COMMAND = """
import os, sys
from transmla.checkpoint import write
from transmla.cli import main
write.BUFFER_BYTES = int(sys.argv[3])
options = ["--latent", "8", "--rope", "4", "--refine", "off", "--tokens", "16384", "-q"]
main(["convert", sys.argv[1], sys.argv[2], *options])
"""


def convert(out: Path, buffer_bytes: int = BUFFER_BYTES, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, "stories260k", str(out), str(buffer_bytes)]
    return subprocess.Popen(command, cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_scheduler_stops_it_like_ctrl_c(tmp_path: Path) -> None:
    running = convert(tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal"
    while not list(journal.glob("*layer-*")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate()
    assert running.returncode == 143 and "the same command resumes" in errors
    assert {path.name for path in journal.parent.iterdir()} == {".transmla-partial", "journal"}
    assert list(journal.glob("*layer-*"))


# the journal's files have up to 100 kB; a file that is written tensor by tensor begins with room for a header of 262 kB
@pytest.mark.parametrize(("buffer_bytes", "limit"), [(BUFFER_BYTES, 200_000), (0, 600_000)], ids=["whole", "streamed"])
def test_a_file_may_not_grow_beyond_a_limit(tmp_path: Path, buffer_bytes: int, limit: int) -> None:
    """RLIMIT_FSIZE: like a full disk in the middle of a file, seen from safetensors' own code too."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    running = convert(tmp_path / "out", buffer_bytes, preexec_fn=limited)
    _, errors = running.communicate()
    assert running.returncode == 8 and "the disk is full" in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_digests_tell_folders_apart(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    assert digest(tmp_path / "a" / "file") != digest(tmp_path / "b" / "file")
