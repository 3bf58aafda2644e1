"""Where a checkpoint may be written: the checks before, the lock on DST.partial, its end, disk errors in words.

The life of a destination; a kill leaves what stands between two lines, and the next command goes on from there:

    DST.partial/                       made, empty: whoever comes next takes it
    DST.partial/.transmla-partial      the marker, locked by the process that writes
    DST.partial/journal/, files        finished steps, and what is being written
    DST.partial/.transmla-complete     the marker, renamed when everything else is on the disk
    DST/.transmla-complete             the folder has its name and is finished; what is left in it is cleared
    DST/                               without journal and marker
"""

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from transmla.errors import DestinationError
from transmla.tables import size

MARKER = ".transmla-partial"
# the marker of a folder that is complete; in a folder with its final name there is nothing left to do but to clear up
COMPLETE = ".transmla-complete"
JOURNAL = "journal"

# by these words safetensors and torch name what the operating system has told them
_WRAPPED = ("I/O error", "os error", "PytorchStreamWriter failed")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def named_path(name: str | Path) -> Path:
    """The path that a name in a Python call means, in which ~ is the home folder as it is in a shell."""
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # nobody's home
        return path.expanduser()
    return path


def partial_of(destination: Path) -> Path:
    """The folder that is written to; it gets the name `destination` when all is done."""
    absolute = Path(os.path.abspath(destination))
    return absolute.with_name(absolute.name + ".partial")


def journal_of(destination: Path) -> Path:
    """Where the finished steps of an unfinished run are kept, see checkpoint/journal.py."""
    return partial_of(destination) / JOURNAL


def check_destination(path: Path, needed_bytes: int = 0, *, resumes: bool = False) -> None:
    """Raise `DestinationError` unless a folder of that size can be made at `path`, empty or new.

    resumes: it may have a journal, because the caller goes on with it; any other would delete it
    """
    with disk_errors(path):
        clear_finished(path)
        if path.is_file():
            _clear_beside(path)
        is_empty_folder = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
        if (path.is_symlink() or path.exists()) and not is_empty_folder:
            raise _refused(path, "the destination exists already", "nothing is ever overwritten", _OTHER)
        if is_empty_folder and (os.path.ismount(path) or os.path.samefile(path, os.curdir)):
            why = "a finished folder is moved there, and this is a mount point or the working directory"
            raise _refused(
                path, "the destination cannot be replaced", why, f"name a folder inside it: {path / 'model'}"
            )
        partial = partial_of(path)
        _check_parent(path)
        if not resumes:
            _refuse_journal(path)
        free_bytes = shutil.disk_usage(partial.parent).free
        if (partial / MARKER).is_file():  # an abandoned run's files will be replaced
            free_bytes += _bytes_in(partial)
        if needed_bytes > free_bytes:
            why = f"{size(needed_bytes)} are needed, {size(free_bytes)} are free"
            raise _refused(
                path, "the disk is too small", why, "free some space, or choose another disk or a smaller dtype"
            )


def _refuse_journal(destination: Path) -> None:
    """`DestinationError` if finished steps of another command are kept there."""
    if journal_of(destination).is_dir():
        what, why = "an unfinished conversion or healing is in the way", "its finished steps would be lost"
        remedy = "finish it with the command that began it, choose another destination, or remove"
        raise _refused(journal_of(destination), what, why, f"{remedy} {partial_of(destination)}")


def _check_parent(path: Path) -> None:
    """Raise `DestinationError` unless something can be made beside `path`."""
    parent, what = Path(os.path.abspath(path)).parent, "the destination cannot be created"
    if parent.exists() and not parent.is_dir():
        raise _refused(path, what, f"{parent} is no folder", _OTHER)
    if not parent.is_dir():
        raise _refused(path, what, f"there is no folder {parent}", f"create it: mkdir -p {shlex.quote(str(parent))}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _refused(path, what, f"no permission to write in {parent}", _OTHER)


def _bytes_in(folder: Path) -> int:
    """Of all files, some of which another process may be deleting at this moment."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def lock_partial(destination: Path, *, resumes: bool = False) -> IO[str]:
    """Make DST.partial, empty but for a journal, and hold its marker file locked; closing the file unlocks it.

    The lock belongs to the open file, so it vanishes with a killed process and leaves nothing to guess at.
    resumes: see `check_destination`, after which another command may have left a journal
    """
    partial = partial_of(destination)
    with disk_errors(partial):
        lock = _open_marker(partial)
        try:
            _lock(lock, partial)
            if not resumes:
                _refuse_journal(destination)
            if (partial / COMPLETE).is_file():  # killed before it got its name
                os.rename(partial / COMPLETE, partial / MARKER)
            clear_partial(destination)
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        except BaseException:
            lock.close()
            raise
    return lock


def _open_marker(partial: Path) -> IO[str]:
    with contextlib.suppress(FileExistsError):
        partial.mkdir()
    if not partial.is_symlink():
        for name in (MARKER, COMPLETE):
            if (partial / name).is_file():
                return (partial / name).open("r+")
        # killed between making the folder and the marker, or unmaking them
        if partial.is_dir() and not any(partial.iterdir()):
            with contextlib.suppress(FileExistsError):
                return (partial / MARKER).open("x+")
            return (partial / MARKER).open("r+")
    why = f"it has no {MARKER} file, so it may be something else that is wanted"
    raise _refused(partial, "a folder is in the way", why, "move or remove it")


def _lock(lock: IO[str], partial: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        marker = partial / (COMPLETE if (partial / COMPLETE).is_file() else MARKER)
        if not os.path.samestat(os.fstat(lock.fileno()), os.stat(marker)):
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        why = f"process {lock.read().strip() or 'unknown'} is writing there"
        raise _refused(partial, "the destination is in use", why, "wait for it, or stop it") from None


@contextlib.contextmanager
def exclusive(destination: Path) -> Iterator[Path]:
    """DST.partial, locked and empty, for what is one file in the end; it is removed, whatever happens."""
    lock = lock_partial(destination)
    try:
        yield partial_of(destination)
    finally:
        with contextlib.suppress(OSError):
            remove_partial(destination)
        lock.close()


def clear_partial(destination: Path) -> None:
    """Empty DST.partial, except for marker and journal."""
    for entry in partial_of(destination).iterdir():
        if entry.name not in (MARKER, COMPLETE, JOURNAL):
            _remove(entry)


def remove_partial(destination: Path) -> None:
    """Remove DST.partial with everything in it, the marker last: a kill leaves nothing that would be in the way."""
    partial = partial_of(destination)
    remove_journal(destination)
    clear_partial(destination)
    (partial / MARKER).unlink()
    partial.rmdir()


def remove_journal(destination: Path) -> None:
    """Remove the journal of `destination` at once: after a kill it is there whole or not at all."""
    journal = journal_of(destination)
    if journal.is_dir():
        gone = journal.with_name(JOURNAL + ".removed")
        if gone.is_dir():
            _remove(gone)
        os.rename(journal, gone)
        _remove(gone)


def mark_complete(partial: Path) -> None:
    """Say that everything in the folder is written and verified, so that only its name is missing."""
    os.rename(partial / MARKER, partial / COMPLETE)
    sync(partial)


def mark_unfinished(partial: Path) -> None:
    """Take `mark_complete` back."""
    os.rename(partial / COMPLETE, partial / MARKER)


def clear_finished(folder: Path) -> None:
    """Remove journal and marker from a finished folder, whose writer was killed after the last step but this one.

    Where this is not permitted nothing is done: such a folder is as good as one without them.
    """
    if not (folder / COMPLETE).is_file():
        return
    with contextlib.suppress(OSError):
        if (folder / JOURNAL).is_dir():
            _remove(folder / JOURNAL)
        (folder / COMPLETE).unlink()
        sync(folder)


def _clear_beside(file: Path) -> None:
    """Remove FILE.partial where a run was killed between giving the file its name and removing the folder."""
    partial = partial_of(file)
    if partial.is_dir() and not (partial / JOURNAL).exists():
        with contextlib.suppress(DestinationError, OSError), exclusive(file):
            pass


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn errors of the operating system, also those that safetensors and torch wrap, into `DestinationError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        if number in _FULL or any(os.strerror(code) in str(error) for code in _FULL):
            raise _refused(where, "the disk is full", str(error), "free some space and start again") from error
        if not isinstance(error, OSError) and not any(words in str(error) for words in _WRAPPED):
            raise
        why = getattr(error, "strerror", None) or str(error)
        raise _refused(where, "the destination cannot be written", why, _OTHER) from error


def check_file(name: str | Path) -> None:
    """Raise `DestinationError` if `write_whole` could not write to the file of this name."""
    path = Path(name)
    if path.is_dir() or str(name).endswith("/"):
        why = "it is a folder" if path.is_dir() else "a name that ends in / is the name of a folder"
        raise _refused(path, "the file cannot be written", why, "give the name of a file")
    if not path.exists() or path.is_file():
        _check_parent(Path(os.path.realpath(path)))


def check_folder(name: str | Path) -> None:
    """Raise `DestinationError` if files could not be written to the folder of this name, made with its parents."""
    path = Path(os.path.abspath(name))
    found = next(place for place in (path, *path.parents) if place.exists())
    if not found.is_dir():
        raise _refused(path, "the folder cannot be made", f"{found} is no folder", "give the name of a folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise _refused(path, "the folder cannot be written", f"no permission to write in {found}", _OTHER)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or as it was before, also after a kill; `DestinationError`."""
    with disk_errors(path):
        if path.exists() and not path.is_file():  # a terminal or a pipe, of which the real path has no file
            path.write_text(text, encoding="utf-8")
            return
    path = Path(os.path.realpath(path))
    # a name that nothing of the user's has
    partial = path.with_name(f"{path.name}.{os.getpid()}.new")
    with disk_errors(path):
        try:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


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
