"""Safetensors, one file or shards. The headers are checked here, the tensors read by safetensors itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from transmla.checkpoint.shards import indexed_tensors, shard_of_tensors
from transmla.checkpoint.store import REDOWNLOAD, TensorInfo, broken_file, broken_tensor, parsed_json
from transmla.errors import SourceError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself
MOST_BRACKETS = 3 * 2**20  # three for each tensor; what is parsed takes up to a hundred bytes for each

# by their names in the format: ours, and bytes per value
STORED_DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4), "F64": ("float64", 8)}


class SafetensorsStore:
    """`WeightStore` of model.safetensors or model.safetensors.index.json."""

    def __init__(self, path: Path) -> None:
        """path: the single file or the index file"""
        if path.name.endswith(".json"):
            self._file_of = shard_of_tensors(path)
            headers = {file: read_header(file) for file in self.files()}
            self.tensors = indexed_tensors(path, self._file_of, headers)
        else:
            self.tensors = read_header(path)
            self._file_of = dict.fromkeys(self.tensors, path)

    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def view(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self._file_of[name], framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(name)
                return tensor
        except (SafetensorError, OSError, ValueError) as error:
            raise broken_tensor(self._file_of[name], name, str(error)) from error

    def view_rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        # a view of the mapped file: only the pages of these rows are read
        return self.view(name)[index]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a file claims to hold, after checking that it is long enough to hold them."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            _check_header_length(path, start, header_bytes, num_bytes)
            written = file.read(header_bytes)
        if written.count(b"[") + written.count(b"{") > MOST_BRACKETS:
            raise ValueError("more tensors than any model has")
        header = parsed_json(written, MAX_HEADER_BYTES)
        tensors = {
            name: _tensor_info(path, name, entry, 8 + header_bytes)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        data_bytes = max((int(entry["data_offsets"][1]) for n, entry in header.items() if n in tensors), default=0)
    except OSError as error:
        raise broken_file(path, error.strerror or str(error), "check that the file exists and is readable") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise broken_file(path, f"the header is damaged ({type(error).__name__}: {error})") from error
    if 8 + header_bytes + data_bytes > num_bytes:
        last = max(tensors, key=lambda name: header[name]["data_offsets"][1])
        why = f"truncated: {num_bytes} of {8 + header_bytes + data_bytes} bytes"
        raise SourceError("a weight file is truncated", where=f"{path}, tensor {last}", why=why, remedy=REDOWNLOAD)
    return tensors


def _check_header_length(path: Path, start: bytes, header_bytes: int, num_bytes: int) -> None:
    if start == b"version ":
        raise broken_file(path, "it is a git-lfs pointer, not the weights", "run `git lfs pull` in that folder")
    if len(start) == 8 and header_bytes > MAX_HEADER_BYTES:
        raise broken_file(path, f"not a safetensors file: it claims a header of {header_bytes} bytes")
    if len(start) < 8 or 8 + header_bytes > num_bytes:
        raise broken_file(path, f"truncated: the file ends after {num_bytes} bytes, inside its header")


def _tensor_info(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype, element_bytes = STORED_DTYPES.get(entry["dtype"], (entry["dtype"].lower(), None))
    if not all(type(number) is int for number in (begin, end, *entry["shape"])):
        raise broken_tensor(path, name, "its shape and place are not whole numbers")
    if (
        not 0 <= begin <= end
        or min(shape, default=0) < 0
        or (element_bytes and end - begin != math.prod(shape) * element_bytes)
    ):
        raise broken_tensor(path, name, f"{end - begin} bytes cannot be a {dtype} tensor of shape {list(shape)}")
    return TensorInfo(shape=shape, dtype=dtype, num_bytes=end - begin, file=path.name, offset=data_start + begin)
