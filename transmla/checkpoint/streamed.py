"""A safetensors file that is written tensor by tensor, so that none of them is held.

In the format (https://github.com/huggingface/safetensors#format), eight bytes with the length of a header come first,
then the header, JSON that may end in spaces, then the values. Room for the header is left and filled at the end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from transmla.checkpoint.safetensors_file import STORED_DTYPES

# room for some two thousand tensors
HEADER_BYTES = 2**18
_NAMES = {name: stored for stored, (name, _) in STORED_DTYPES.items()}


class StreamedFile:
    """Raises what the file system raises."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._room = HEADER_BYTES - len(json.dumps(self._entries))
        self._end = 0  # of the values so far
        self._file = path.open("wb")
        self._file.seek(8 + HEADER_BYTES)

    def takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the header has room for one more tensor, and its values would be aligned."""
        return self._length(name, self._entry(tensor)) <= self._room and self._end % tensor.element_size() == 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor that it `takes`, of a dtype that weights have."""
        entry = self._entry(tensor)
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._entries[name] = entry
        self._room -= self._length(name, entry)
        self._end = entry["data_offsets"][1]

    def finish(self) -> None:
        """Write the header; nothing can be added after it."""
        header = json.dumps(self._entries).encode()
        assert len(header) <= HEADER_BYTES
        self._file.seek(0)
        self._file.write(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES))
        self._file.close()

    def close(self) -> None:
        """Leave the file as it is; one that is not finished cannot be read."""
        self._file.close()

    def _entry(self, tensor: torch.Tensor) -> dict[str, Any]:
        dtype = _NAMES[str(tensor.dtype).removeprefix("torch.")]
        return {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [self._end, self._end + tensor.nbytes]}

    @staticmethod
    def _length(name: str, entry: dict[str, Any]) -> int:
        """Bytes of an entry in the header, with a comma and a space."""
        return len(json.dumps({name: entry}))
