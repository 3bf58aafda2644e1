"""What a weight format has to offer, and the errors that all formats share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transmla.errors import SourceError, TransmlaError

if TYPE_CHECKING:
    import torch

# the element types that weights may have, by their names in torch
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")

REDOWNLOAD = "download the file again; a partly copied checkpoint cannot be converted"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the file header describes it."""

    shape: tuple[int, ...]
    dtype: str  # what reading gives: "bfloat16"; "float32" for quantised GGUF blocks
    num_bytes: int  # as stored
    file: str  # name of the weight file
    offset: int | None = None  # of its first byte in the file, where that is known


class WeightStore(Protocol):
    """Weight files of one format, opened for each tensor anew, so that nothing stays in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By Hugging Face names."""

    def view(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU; may be a view of the mapped file, so the caller must copy."""

    def view_rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """The rows `index` of a matrix, without reading the others where the format allows."""

    def files(self) -> list[Path]:
        """The weight files."""


class RenamedStore:
    """`WeightStore` of another one's tensors, some under other names.

    stored: new name -> name in the file;  others: whether tensors that keep their names are there, too
    """

    def __init__(self, store: WeightStore, stored: Mapping[str, str], *, others: bool = True) -> None:
        self._store, self._stored = store, stored
        gone = set(stored.values()) - set(stored)
        kept = {name: info for name, info in store.tensors.items() if others and name not in gone}
        self.tensors: Mapping[str, TensorInfo] = kept | {new: store.tensors[name] for new, name in stored.items()}

    def files(self) -> list[Path]:
        return self._store.files()

    def view(self, name: str) -> torch.Tensor:
        return self._store.view(self._stored.get(name, name))

    def view_rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        return self._store.view_rows(self._stored.get(name, name), index)


def readable(path: Path) -> bytes:
    """The content of a small file of a source; `SourceError` where it cannot be read."""
    with source_errors(path):
        return path.read_bytes()


def parsed_json(content: bytes | str, most_bytes: int) -> Any:
    """JSON of a stranger; `ValueError` for what is none, is too long, or nested deeper than anything real."""
    if len(content) > most_bytes:
        raise ValueError(f"it has {len(content):,} bytes, and {most_bytes:,} is the most that is read")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextlib.contextmanager
def understood(where: str) -> Iterator[None]:
    """Turn whatever values of other types and sizes than expected provoke in libraries into `SourceError`."""
    try:
        yield
    except (TransmlaError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise SourceError(
            "the model's description cannot be used",
            where=where,
            why=f"{type(error).__name__}: {reason[:300]}",
            remedy="check the file, or download it again; it may be of another version of the model",
        ) from error


@contextlib.contextmanager
def source_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into `SourceError`."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            "a file of the model cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            remedy="check the disk that it is on, and that nothing removes it while it is used",
        ) from error


def broken_file(path: Path, why: str, remedy: str = REDOWNLOAD) -> SourceError:
    return SourceError("a weight file cannot be read", where=str(path), why=why, remedy=remedy)


def broken_tensor(path: Path, name: str, why: str, remedy: str = REDOWNLOAD) -> SourceError:
    return SourceError("a tensor cannot be read", where=f"{path}, tensor {name}", why=why, remedy=remedy)


def first_few(names: Iterable[str], num_shown: int = 5) -> str:
    """The first names and how many more there are."""
    names = list(names)
    more = len(names) - num_shown
    return ", ".join(names[:num_shown]) + (f" and {more} more" if more > 0 else "")
