"""The journal: whole steps or none, refused when it belongs to other settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transmla.checkpoint.journal import Journal
from transmla.errors import DestinationError

SETTINGS = {"theta": "auto", "files": {"a": [1, 2]}, "ratio": 0.1}


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    (tmp_path / "out.partial").mkdir()
    return tmp_path / "out"


def test_what_was_saved_is_loaded(destination: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(0.1, dtype=torch.float64), "c": torch.randn(4, 3).T}
    Journal(destination, SETTINGS).save("step", tensors, {"loss": 0.5, "list": [1, 2]})
    loaded = Journal(destination, SETTINGS).load("step")
    assert loaded is not None
    assert loaded[1] == {"loss": 0.5, "list": [1, 2]} and loaded[0].keys() == tensors.keys()
    assert all(torch.equal(loaded[0][name], tensors[name]) for name in tensors)
    assert loaded[0]["b"].dtype == torch.float64
    assert Journal(destination, SETTINGS).values("step") == loaded[1]


def test_what_is_not_worth_a_folder_waits_for_the_next_step(destination: Path) -> None:
    journal = Journal(destination, SETTINGS)
    journal.save("text", {"a": torch.zeros(2)}, {"name": "x"}, alone=False)
    assert not journal.folder.exists() and journal.load("text") is None
    journal.save("step", {"a": torch.ones(1)})
    assert journal.values("text") == {"name": "x"} and "step" in Journal(destination, SETTINGS)
    journal.drop("text")
    journal.save("other", {"a": torch.ones(1)})
    assert journal.load("text") is None, "once"


def test_missing_replaced_and_dropped(destination: Path) -> None:
    journal = Journal(destination, SETTINGS)
    assert journal.load("step") is None and journal.values("step") is None and "step" not in journal
    journal.save("step", {"a": torch.zeros(1)})
    journal.save("step", {"a": torch.ones(1)})
    loaded = journal.load("step")
    assert loaded is not None and float(loaded[0]["a"]) == 1
    journal.drop("step")
    journal.drop("step")
    assert journal.load("step") is None


def test_other_settings_are_refused_by_name(destination: Path) -> None:
    Journal(destination, SETTINGS).save("step", {"a": torch.zeros(1)})
    with pytest.raises(DestinationError, match=r"differs in files\.a \(\[1, 2\] then, \[1, 3\] now\), more") as caught:
        Journal(destination, SETTINGS | {"files": {"a": [1, 3]}, "more": 1})
    assert caught.value.exit_code == 8 and "--restart" in caught.value.remedy
    assert "an unfinished run" in caught.value.what, "it may be a healing"
    assert "step" not in Journal(destination, SETTINGS | {"more": 1}, restart=True)


@pytest.mark.parametrize("left", ["nothing", "half"])
def test_settings_are_there_whole_or_not_at_all(destination: Path, left: str) -> None:
    """What a full disk or a kill leaves of the beginning is no obstacle."""
    folder = destination.with_name("out.partial") / "journal"
    folder.mkdir()
    if left == "half":
        (folder / "settings.writing").write_text("{")
    Journal(destination, SETTINGS).save("step", {"a": torch.zeros(1)})
    assert json.loads((folder / "settings.json").read_text()) == SETTINGS
    with pytest.raises(DestinationError, match="differs in more"):
        Journal(destination, SETTINGS | {"more": 1})


def test_steps_without_settings_are_refused(destination: Path) -> None:
    journal = Journal(destination, SETTINGS)
    journal.save("step", {"a": torch.zeros(1)})
    (journal.folder / "settings.json").unlink()
    with pytest.raises(DestinationError, match="unknown settings is in the way") as caught:
        Journal(destination, SETTINGS)
    assert "--restart" in caught.value.remedy
    assert "step" not in Journal(destination, SETTINGS, restart=True)


def test_steps_are_dropped_by_pattern(destination: Path) -> None:
    journal = Journal(destination, SETTINGS)
    for name in ("8-4-layer-00000", "8-4-layer-00001", "8-4-theta", "28-4-layer-00000"):
        journal.save(name, {"a": torch.zeros(1)})
    journal.drop("8-4-layer-*")
    assert {path.stem for path in journal.folder.glob("*.safetensors")} == {"8-4-theta", "28-4-layer-00000"}


def test_nothing_is_written_before_the_first_step(destination: Path) -> None:
    Journal(destination, SETTINGS)
    assert list(destination.with_name("out.partial").iterdir()) == []


KILLED = """
import json, os, sys, torch
from pathlib import Path
from transmla.checkpoint import journal
made = journal.Journal(Path(sys.argv[1]), json.loads(sys.argv[2]))
made.save("first", {"a": torch.ones(2)})
journal.os.replace = lambda *_: os.kill(os.getpid(), 9)
made.save("second", {"a": torch.ones(2)})
"""


def test_a_step_that_was_being_written_when_killed_is_not_there(destination: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(destination), json.dumps(SETTINGS)]
    assert subprocess.run(command, check=False).returncode == -9
    journal = Journal(destination, SETTINGS)
    assert "first" in journal and "second" not in journal


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit", "settings"])
def test_damage_is_found(destination: Path, damage: str) -> None:
    journal = Journal(destination, SETTINGS)
    journal.save("step", {"a": torch.randn(64)}, {"loss": 0.5})
    path = journal.folder / ("settings.json" if damage == "settings" else "step.safetensors")
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes({"cut": content[:-9], "empty": b"", "a bit": bytes(content), "settings": b'{"theta'}[damage])
    message = "settings is in the way" if damage == "settings" else "is damaged"
    with pytest.raises(DestinationError, match=message) as caught:
        Journal(destination, SETTINGS).load("step")
    assert "--restart" in caught.value.remedy
    assert Journal(destination, SETTINGS, restart=True).load("step") is None
