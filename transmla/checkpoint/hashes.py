"""SHA-256 of files, each read once: by it sources, texts and what was written are recognised again."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from transmla.checkpoint.store import source_errors

# (path, inode, size, time of the last change) -> digest; a file that changes meanwhile is read again
_known: dict[tuple[str, int, int, int], str] = {}


def sha256(path: Path) -> str:
    """Digest of a file in hexadecimal digits, read in pieces; within one process a file is read once."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        key = (os.path.abspath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in _known:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _known[key]


def fresh_sha256(path: Path) -> str:
    """The same, read now whatever was read before: a failing disk changes neither size nor time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> SHA-256; `SourceError` for a file that cannot be read."""
    hashes = {}
    for path in paths:
        with source_errors(path):
            hashes[path.name] = sha256(path)
    return hashes
