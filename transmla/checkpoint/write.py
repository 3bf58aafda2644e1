"""Write a checkpoint: everything into DST.partial, shard by shard, and one rename when it is right."""

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from safetensors.torch import save_file

from transmla.checkpoint.destination import (
    JOURNAL,
    MARKER,
    check_destination,
    clear_finished,
    clear_partial,
    disk_errors,
    journal_of,
    lock_partial,
    mark_complete,
    mark_unfinished,
    partial_of,
    remove_partial,
    sync,
)
from transmla.checkpoint.hashes import sha256
from transmla.checkpoint.shards import BUFFER_BYTES, SHARD_BYTES
from transmla.checkpoint.store import readable
from transmla.checkpoint.streamed import StreamedFile
from transmla.errors import VerificationError

__all__ = ["SHARD_BYTES", "CheckpointWriter", "check_destination"]


class CheckpointWriter:
    """Context manager. Without `commit()` nothing is left at the end, whatever happened inside, but a journal."""

    def __init__(self, destination: Path, *, shard_bytes: int = SHARD_BYTES, resumes: bool = False) -> None:
        """shard_bytes: a weight file is ended before it would grow beyond this;  resumes: see `check_destination`"""
        self.destination = destination
        self.partial = partial_of(destination)
        self._shard_bytes, self._resumes = shard_bytes, resumes
        self._pending: dict[str, torch.Tensor] = {}  # tensors of the shard that are not in its file yet
        self._shard_names: list[str] = []  # all tensors of the shard
        self._num_shard_bytes = 0
        self._streamed: StreamedFile | None = None  # the shard's file, if it has been begun
        self._total_bytes = 0
        self._shards: list[list[str]] = []  # names of the tensors in each written shard
        self._names: set[str] = set()
        self._hashes: dict[str, str] = {}  # of the weight files, by their names
        self._closed = False
        self._committed = False
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        check_destination(self.destination, resumes=self._resumes)
        self._lock = lock_partial(self.destination, resumes=self._resumes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pending.clear()
        if self._streamed is not None:
            with contextlib.suppress(OSError):  # a full disk is still full for what is left in the buffer
                self._streamed.close()
        if not self._committed:
            with contextlib.suppress(OSError):  # the error that brought us here is the one to report
                if journal_of(self.destination).is_dir():
                    clear_partial(self.destination)
                else:
                    remove_partial(self.destination)
        if self._lock is not None:
            self._lock.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, or take a copy of it; at most `BUFFER_BYTES` of copies are held."""
        if self._closed or name in self._names:
            raise ValueError(f"{name} was added twice, or after the shards were closed")
        num_bytes = tensor.numel() * tensor.element_size()
        if self._shard_names and self._num_shard_bytes + num_bytes > self._shard_bytes:
            self._end_shard()
        if self._streamed is None and self._num_shard_bytes + num_bytes > BUFFER_BYTES:
            self._begin_file()
        if self._streamed is not None:
            self._stream(self._streamed, name, tensor)
        else:
            self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            self._count(name, num_bytes)
        self._total_bytes += num_bytes
        self._names.add(name)

    def add_as(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        """`add` in another dtype; `VerificationError` if that cannot hold it."""
        self.add(name, self.stored(name, tensor, dtype))

    @staticmethod
    def stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor, or a part of one, in the dtype of the file; `VerificationError` if that cannot hold it."""
        stored = tensor.to(dtype)
        if not torch.isfinite(torch.stack(torch.aminmax(stored))).all():
            largest, limit = float(tensor.abs().max()), torch.finfo(dtype).max
            raise VerificationError(
                "a weight does not fit into the wanted dtype",
                where=name,
                why=f"its largest value is {largest:.3g}, {dtype} ends at {limit:.3g}",
                remedy="use --dtype bfloat16 or float32",
            )
        return stored

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        with disk_errors(self.partial / name):
            (self.partial / name).write_text(text, encoding="utf-8")

    def copy_file(self, path: Path, name: str | None = None) -> None:
        """Copy a file, keeping its name unless another is given."""
        self.write_bytes(name or path.name, readable(path))

    def write_bytes(self, name: str, content: bytes) -> None:
        with disk_errors(self.partial / name):
            (self.partial / name).write_bytes(content)

    def close_shards(self) -> None:
        """Write the last shard and, if there are several, their index."""
        if self._shard_names or not self._shards:
            self._end_shard()
        self._closed = True
        if len(self._shards) == 1:
            self._name_shard(1, "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._name_shard(number, final)
            weight_map |= dict.fromkeys(names, final)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        self.write_json("model.safetensors.index.json", index)

    def commit(self) -> None:
        """Force everything to the disk and give it its name. To be called once all has been verified."""
        if not self._closed:
            raise ValueError("close_shards() comes before commit()")
        with disk_errors(self.destination):
            for path in self.partial.rglob("*"):
                if JOURNAL not in path.relative_to(self.partial).parts:
                    sync(path)
            mark_complete(self.partial)
            try:
                # replaces an empty folder, fails on any other: then the journal is still there
                os.rename(self.partial, self.destination)
            except OSError:
                mark_unfinished(self.partial)
                raise
            self._committed = True
            clear_finished(self.destination)
            sync(self.partial.parent)

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of every file that is there by now, by name; weights were read once, right after writing."""
        found = dict(self._hashes)
        with disk_errors(self.partial):
            for path in sorted(self.partial.iterdir()):
                if path.is_file() and path.name not in (MARKER, *found):
                    found[path.name] = sha256(path)
        return dict(sorted(found.items()))

    def _shard_path(self, number: int) -> Path:
        # how many there will be is known only at the end
        return self.partial / f"model-{number:05d}.safetensors"

    def _name_shard(self, number: int, name: str) -> None:
        path = self._shard_path(number)
        with disk_errors(self.partial):
            os.rename(path, self.partial / name)
        self._hashes[name] = self._hashes.pop(path.name)

    def _count(self, name: str, num_bytes: int) -> None:
        """One more tensor of the shard."""
        self._shard_names.append(name)
        self._num_shard_bytes += num_bytes

    def _begin_file(self) -> StreamedFile:
        """Begin the file of the shard, with what is held of it."""
        path = self._shard_path(len(self._shards) + 1)
        held, self._pending, self._shard_names, self._num_shard_bytes = self._pending, {}, [], 0
        with disk_errors(path):
            self._streamed = StreamedFile(path)
        for name, tensor in held.items():
            self._stream(self._streamed, name, tensor)
        return self._streamed

    def _stream(self, file: StreamedFile, name: str, tensor: torch.Tensor) -> None:
        """Into the file of the shard, or into that of another one if it takes no more."""
        if not file.takes(name, tensor):
            self._end_shard()
            file = self._begin_file()
        with disk_errors(file.path):
            file.add(name, tensor)
        self._count(name, tensor.nbytes)

    def _end_shard(self) -> None:
        path = self._shard_path(len(self._shards) + 1)
        with disk_errors(path):
            if self._streamed is None:
                save_file(self._pending, path, metadata={"format": "pt"})
            else:
                self._streamed.finish()
            # safetensors makes files that only their owner can read
            path.chmod((self.partial / MARKER).stat().st_mode)
            sync(path)
            self._hashes[path.name] = sha256(path)
        self._shards.append(self._shard_names)
        self._streamed, self._pending, self._shard_names, self._num_shard_bytes = None, {}, [], 0
