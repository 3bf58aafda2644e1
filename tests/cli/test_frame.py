"""How a command ends: by signals that libraries lose, and by errors that are none."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import click
import pytest
import torch

from transmla import devices
from transmla.cli import main
from transmla.cli.frame import emit, errors, note_emulation, source_of
from transmla.errors import DestinationError, SourceError

BROKEN = SourceError("a tensor cannot be read", where="a file", why="it has no shape", remedy="download it again")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_a_library_turns_into_an_error(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """As torch does, in safetensors: the command was stopped, and no file is broken."""
    # of a job in the background, shells have it ignored
    given = signal.getsignal(number)
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, given))
    with pytest.raises(SystemExit) as ended, errors():
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        raise BROKEN
    assert ended.value.code == code and signal.getsignal(number) is before
    assert capsys.readouterr().err == "interrupted; nothing is half-written\n"


@pytest.mark.parametrize(
    ("name", "params", "resumes"),
    [("convert", {}, True), ("heal", {}, True), ("eval", {}, False), ("eval", {"json_file": "-"}, False),
     ("eval", {"json_file": "out.json"}, True), ("eval", {"json_file": os.devnull}, False), ("generate", {}, False)],
)  # fmt: skip
def test_only_what_keeps_its_work_says_that_it_resumes(
    name: str, params: dict[str, str], resumes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    context = click.Context(main.commands[name], info_name=name)
    context.params = params
    with pytest.raises(SystemExit), context.scope(), errors():
        raise KeyboardInterrupt
    assert ("the same command resumes" in capsys.readouterr().err) is resumes


def test_an_error_without_a_signal_is_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors():
        raise BROKEN
    assert ended.value.code == BROKEN.exit_code == 3 and "download it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "narrow", "said"),
    [("bfloat16", None, True), ("bfloat16", torch.bfloat16, False), ("float32", None, False), ("auto", None, False)],
)
def test_a_dtype_that_the_machine_emulates_is_said(
    dtype: str,
    narrow: torch.dtype | None,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(devices, "narrow_dtype", lambda device: narrow if device.type == "cpu" else None)
    note_emulation(dtype, "cpu")
    assert ("--dtype float32" in capsys.readouterr().err) is said


def test_tables_and_the_file_do_not_hang_on_each_other(tmp_path: Path) -> None:
    """After hours of measuring, one of the two is better than none."""

    def broken() -> None:
        raise RuntimeError("no table")

    with pytest.raises(RuntimeError, match="no table"):
        emit(lambda: {"a": 1}, str(tmp_path / "a.json"), broken)
    assert (tmp_path / "a.json").read_text("utf-8").split() == ["{", '"a":', "1", "}"]
    shown: list[int] = []
    with pytest.raises(DestinationError):
        emit(lambda: {"a": 1}, str(tmp_path / "no" / "a.json"), lambda: shown.append(1))
    assert shown == [1]


def test_a_folder_that_does_not_name_its_source_is_compared_with_nothing(tmp_path: Path) -> None:
    (tmp_path / "transmla.json").write_text('{"format": 1, "files": {}}')
    assert source_of(str(tmp_path), None) is None
