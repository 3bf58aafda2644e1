"""Where a checkpoint may be written: the checks before, the lock on DST.partial, disk errors in words."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from transmla.errors import DestinationError

MARKER = ".transmla-partial"
JOURNAL = "journal"

_GIB = 2**30
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_of(destination: Path) -> Path:
    """The folder that is written to; it gets the name `destination` when all is done."""
    absolute = Path(os.path.abspath(destination))
    return absolute.with_name(absolute.name + ".partial")


def journal_of(destination: Path) -> Path:
    """Where the finished steps of an unfinished conversion are kept, see checkpoint/journal.py."""
    return partial_of(destination) / JOURNAL


def check_destination(path: Path, needed_bytes: int = 0) -> None:
    """Raise `DestinationError` unless a folder of that size can be made at `path`, empty or new."""
    is_empty_folder = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if (path.is_symlink() or path.exists()) and not is_empty_folder:
        raise _refused(path, "the destination exists already", "nothing is ever overwritten", _OTHER)
    partial = partial_of(path)
    if not partial.parent.is_dir():
        why = f"there is no folder {partial.parent}"
        raise _refused(path, "the destination cannot be created", why, f"create it: mkdir -p {partial.parent}")
    if not os.access(partial.parent, os.W_OK | os.X_OK):
        why = f"no permission to write in {partial.parent}"
        raise _refused(path, "the destination cannot be created", why, _OTHER)
    free_bytes = shutil.disk_usage(partial.parent).free
    if (partial / MARKER).is_file():  # an abandoned run's files will be replaced
        free_bytes += sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if needed_bytes > free_bytes:
        why = f"{needed_bytes / _GIB:.2f} GiB are needed, {free_bytes / _GIB:.2f} GiB are free"
        raise _refused(path, "the disk is too small", why, "free some space, or choose another disk or a smaller dtype")


def lock_partial(destination: Path) -> IO[str]:
    """Make DST.partial, empty but for a journal, and hold its marker file locked; closing the file unlocks it.

    The lock belongs to the open file, so it vanishes with a killed process and leaves nothing to guess at.
    """
    partial = partial_of(destination)
    marker = partial / MARKER
    with disk_errors(partial):
        try:
            partial.mkdir()
            lock = marker.open("x+")
        except FileExistsError:
            if partial.is_symlink() or not marker.is_file():
                why = f"it has no {MARKER} file, so it may be something else that is wanted"
                raise _refused(partial, "a folder is in the way", why, "move or remove it") from None
            lock = marker.open("r+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(marker)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            why = f"process {lock.read().strip() or 'unknown'} is writing there"
            lock.close()
            raise _refused(partial, "the destination is in use", why, "wait for it, or stop it") from None
        clear_partial(destination)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
    return lock


def clear_partial(destination: Path) -> None:
    """Empty DST.partial, except for marker and journal."""
    for entry in partial_of(destination).iterdir():
        if entry.name in (MARKER, JOURNAL):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn errors of the operating system, also those that safetensors wraps, into `DestinationError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in _FULL or os.strerror(errno.ENOSPC) in str(error):
            raise _refused(where, "the disk is full", str(error), "free some space and start again") from error
        if isinstance(error, SafetensorError) and "I/O error" not in str(error) and "os error" not in str(error):
            raise
        why = getattr(error, "strerror", None) or str(error)
        raise _refused(where, "the destination cannot be written", why, _OTHER) from error


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_OTHER = "choose another destination, or remove what is there"


def _refused(where: Path, what: str, why: str, remedy: str) -> DestinationError:
    return DestinationError(what, where=str(where), why=why, remedy=remedy)
