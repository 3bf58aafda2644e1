"""pytorch_model.bin, one file or shards: read only where torch can do it without running any of its code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from transmla.checkpoint.shards import indexed_tensors, shard_of_tensors
from transmla.checkpoint.store import TensorInfo, broken_file, broken_tensor

if TYPE_CHECKING:
    import torch

_TO_SAFETENSORS = "convert the model to safetensors, on a machine where you trust its author, and pass that folder"


class BinStore:
    """`WeightStore` of pytorch_model.bin or pytorch_model.bin.index.json."""

    def __init__(self, path: Path) -> None:
        """path: the single file or the index file"""
        if path.name.endswith(".json"):
            self._file_of = shard_of_tensors(path)
            headers = {file: _read_header(file) for file in self.files()}
            self.tensors = indexed_tensors(path, self._file_of, headers)
        else:
            self.tensors = _read_header(path)
            self._file_of = dict.fromkeys(self.tensors, path)

    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def view(self, name: str) -> torch.Tensor:
        return _load(self._file_of[name])[name]

    def view_rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        return self.view(name)[index]


def _read_header(path: Path) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            num_bytes=tensor.numel() * tensor.element_size(),
            file=path.name,
        )
        for name, tensor in _load(path).items()
    }


def _load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file as views of the mapped file: no bytes are read before they are used."""
    import torch

    _check_container(path)
    try:
        tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        why = "it holds more than tensors: reading it would need unpickling code, which could run anything"
        raise broken_file(path, why, _TO_SAFETENSORS) from error
    except Exception as error:  # the unpickler checks little: whatever a damaged file provokes
        raise broken_file(path, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    if not isinstance(tensors, dict):
        raise broken_file(path, f"it holds a {type(tensors).__name__}, not named tensors", _TO_SAFETENSORS)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise broken_tensor(path, name, f"it is a {type(tensor).__name__}, not a tensor", _TO_SAFETENSORS)
    return tensors


def _check_container(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise broken_file(path, error.strerror or str(error), "check that the file exists and is readable") from error
    if start == b"version ":
        raise broken_file(path, "it is a git-lfs pointer, not the weights", "run `git lfs pull` in that folder")
    if not start.startswith(b"PK\x03\x04"):
        why = "it is not in the zip format of torch 1.6: reading it would need unpickling code"
        raise broken_file(path, why, _TO_SAFETENSORS)
    try:
        whole = zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # damaged in a way that is seen this early
        whole = False
    if not whole:
        raise broken_file(path, "truncated: the zip directory at its end is missing")
