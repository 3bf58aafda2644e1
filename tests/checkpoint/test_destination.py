"""Where nothing may be written, and who may write where: existing folders, full disks, other writers."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from transmla.checkpoint.destination import COMPLETE, JOURNAL, MARKER, exclusive, lock_partial, named_path, write_whole
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.write import CheckpointWriter, check_destination
from transmla.errors import DestinationError

CHECKOUT = Path(__file__).parents[2]


def write(destination: Path, tensors: dict[str, torch.Tensor], *, resumes: bool = False) -> None:
    with CheckpointWriter(destination, resumes=resumes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close_shards()
        writer.commit()


def test_existing_destinations(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        with (
            pytest.raises(DestinationError, match="exists already") as error,
            CheckpointWriter(tmp_path / name),
        ):
            raise AssertionError("not reached")
        assert name in str(error.value)
        assert not (tmp_path / f"{name}.partial").exists()


def test_an_empty_folder_is_filled(tmp_path, tensors):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", tensors)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
        with pytest.raises(DestinationError, match=r"cannot be replaced[^$]*inside it: .*disk/model"):
            check_destination(tmp_path / "disk")
        check_destination(tmp_path / "disk" / "model")
    check_destination(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "disk")
    for same in (Path("."), tmp_path / "disk"):
        with pytest.raises(DestinationError, match="cannot be replaced"):
            check_destination(same)
    check_destination(Path("model"))


def test_destination_that_appears_meanwhile(tmp_path):
    with (
        pytest.raises(DestinationError, match="cannot be written"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        writer.close_shards()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        writer.commit()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_journal_outlives_a_destination_that_appears_meanwhile(tmp_path):
    with (
        pytest.raises(DestinationError, match="cannot be written"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        Journal(tmp_path / "out", {}).save("step", {"a": torch.ones(1)})
        writer.close_shards()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        writer.commit()
    assert "step" in Journal(tmp_path / "out", {})
    (tmp_path / "out" / "precious").unlink()
    with CheckpointWriter(tmp_path / "out", resumes=True) as writer:
        writer.close_shards()
        writer.commit()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "model.safetensors"]


def test_a_journal_of_another_command_is_left_alone(tmp_path, tensors):
    lock_partial(tmp_path / "out").close()
    Journal(tmp_path / "out", {}).save("step", {"a": torch.ones(1)})
    for refused in (check_destination, lock_partial, lambda path: write(path, tensors)):
        with pytest.raises(DestinationError, match="an unfinished conversion or healing is in the way"):
            refused(tmp_path / "out")
    with pytest.raises(DestinationError, match="is in the way"), exclusive(tmp_path / "out"):
        raise AssertionError("not reached")
    assert "step" in Journal(tmp_path / "out", {})
    write(tmp_path / "out", tensors, resumes=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_parents(tmp_path, monkeypatch):
    with pytest.raises(DestinationError, match="there is no folder") as error:
        check_destination(tmp_path / "a" / "b")
    assert "mkdir -p" in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="is no folder") as error:
        check_destination(tmp_path / "file" / "b")
    assert "mkdir" not in str(error.value)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DestinationError, match="no permission"):
        check_destination(tmp_path / "a")


def test_relative_destination(tmp_path, monkeypatch, tensors):
    monkeypatch.chdir(tmp_path)
    write(Path("out/"), tensors)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_disk_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 3 * 2**30))
    check_destination(tmp_path / "a", 3 * 2**30)
    with pytest.raises(DestinationError, match=r"4\.0 GiB are needed, 3\.0 GiB are free"):
        check_destination(tmp_path / "a", 4 * 2**30)


def test_space_of_an_abandoned_run_counts_as_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 1000))
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "model-00001.safetensors").write_bytes(b"\0" * 500)
    with pytest.raises(DestinationError):
        check_destination(tmp_path / "a", 1400)
    (tmp_path / "a.partial" / MARKER).touch()
    check_destination(tmp_path / "a", 1400)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("transmla.checkpoint.write.save_file", fail)
    with (
        pytest.raises(DestinationError, match="disk is full") as caught,
        CheckpointWriter(tmp_path / "o") as writer,
    ):
        writer.add("a", torch.ones(1))
        writer.close_shards()
    assert "o.partial" in str(caught.value) and not list(tmp_path.iterdir())


def test_full_disk_while_forcing_files_to_it(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DestinationError, match="disk is full"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
        writer.close_shards()
        monkeypatch.setattr(os, "fsync", fail)
        writer.commit()
    assert not list(tmp_path.iterdir())


def test_other_disk_errors(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(DestinationError, match="Permission denied"), CheckpointWriter(tmp_path / "out"):
        raise AssertionError("not reached")


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from transmla.checkpoint.write import CheckpointWriter
with CheckpointWriter(Path(sys.argv[1]), shard_bytes=1) as writer:
    writer.add("old", torch.ones(1))
    writer.add("older", torch.ones(1))
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_running_writer_is_left_alone_and_a_killed_one_replaced(tmp_path, tensors):
    destination = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(destination)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=CHECKOUT,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        with pytest.raises(DestinationError, match=f"process {other.pid} is writing"):
            write(destination, tensors)
        assert (tmp_path / "out.partial" / "model-00001.safetensors").is_file()
        other.send_signal(signal.SIGKILL)
    (tmp_path / "out.partial" / "folder").mkdir()
    write(destination, tensors)
    assert {path.name for path in destination.iterdir()} == {"model.safetensors"}
    assert not (tmp_path / "out.partial").exists()


def test_two_writers_in_one_process(tmp_path):
    with CheckpointWriter(tmp_path / "out") as first:
        with pytest.raises(DestinationError, match="in use"), CheckpointWriter(tmp_path / "out"):
            raise AssertionError("not reached")
        first.close_shards()
        first.commit()
    assert (tmp_path / "out").is_dir()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, tensors):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").touch()
    with pytest.raises(DestinationError, match=r"in the way[^$]*out\.partial"):
        write(tmp_path / "out", tensors)
    assert (tmp_path / "out.partial" / "thesis.txt").is_file()


def test_an_empty_folder_that_a_kill_left_is_taken(tmp_path, tensors):
    (tmp_path / "out.partial").mkdir()
    write(tmp_path / "out", tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("left", ["complete, not named", "named, not cleared"])
def test_a_kill_around_the_final_name(tmp_path, tensors, left):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    write(out, tensors)
    (out / JOURNAL).mkdir()
    (out / JOURNAL / "settings.json").write_text("{}")
    (out / COMPLETE).touch()
    if left == "complete, not named":
        out.rename(partial)
        write(out, tensors, resumes=True)  # its own marker is taken up again
    else:
        with pytest.raises(DestinationError, match="exists already"):
            check_destination(out)
    assert not partial.exists() and {path.name for path in out.iterdir()} == {"model.safetensors"}


def test_a_journal_is_removed_at_once(tmp_path, monkeypatch):
    """A kill while its files are deleted leaves no half of it to go on from."""
    lock = lock_partial(tmp_path / "out")
    Journal(tmp_path / "out", {}).save("step", {"a": torch.ones(1)})
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path / "out", {"other": 1}, restart=True)
    monkeypatch.undo()
    lock.close()
    lock_partial(tmp_path / "out").close()
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [MARKER]


def test_two_exports_to_one_name(tmp_path):
    with exclusive(tmp_path / "out.gguf") as folder:
        (folder / "made.gguf").touch()
        with pytest.raises(DestinationError, match="in use"), exclusive(tmp_path / "out.gguf"):
            raise AssertionError("not reached")
        assert (folder / "made.gguf").is_file()
    assert not list(tmp_path.iterdir())


def test_what_is_beside_a_finished_file_is_cleared(tmp_path):
    (tmp_path / "out.gguf").touch()
    (tmp_path / "out.gguf.partial").mkdir()
    (tmp_path / "out.gguf.partial" / MARKER).touch()
    with pytest.raises(DestinationError, match="exists already"):
        check_destination(tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_small_file_is_written_whole(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(DestinationError, match="Input/output"):
        write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    (tmp_path / "a.json.new").write_text("mine")
    write_whole(tmp_path / "a.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "new", "a.json.new": "mine"}


def test_the_home_folder_in_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_path("~/out") == tmp_path / "out" and named_path("out") == Path("out")
    assert named_path("~nobody-of-transmla/out") == Path("~nobody-of-transmla/out")
