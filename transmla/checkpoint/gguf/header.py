"""The header of a GGUF file, walked through before the gguf library reads it: that one believes every count and length.

magic, version, number of tensors and of values; each value: key, type, content; each tensor: name, sizes, type, place.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

# of types 0 to 12, bytes; strings and arrays have a length of their own
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
# more than any model has; the library makes objects of every element of an array
_MOST_TENSORS, _MOST_VALUES, _MOST_ELEMENTS, _MOST_DIMENSIONS, _MOST_NAME = 2**18, 2**14, 2**21, 4, 2**16


def check_header(path: Path) -> None:
    """Raise `ValueError` unless everything that the header counts lies within the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _Walk(content).header()


class _Walk:
    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._place = content, 4

    def header(self) -> None:
        version = self._number(4)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are read")
        tensors = self._count("tensors", _MOST_TENSORS)
        values = self._count("values", _MOST_VALUES)
        for _ in range(values):
            self._name()
            self._value(self._number(4))
        for _ in range(tensors):
            self._name()
            dimensions = self._number(4)
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number(8))
        elif kind == _ARRAY:
            inner = self._number(4)
            count = self._count("elements of an array", _MOST_ELEMENTS)
            if inner == _STRING:
                for _ in range(count):
                    self._skip(self._number(8))
            else:
                self._skip(count * self._width(inner))
        else:
            self._skip(self._width(kind))

    def _width(self, kind: int) -> int:
        if kind not in _WIDTHS:
            raise ValueError(f"a value of the unknown type {kind}")
        return _WIDTHS[kind]

    def _name(self) -> None:
        length = self._number(8)
        if length > _MOST_NAME:
            raise ValueError(f"a name of {length:,} bytes")
        self._skip(length)

    def _count(self, what: str, most: int) -> int:
        count = self._number(8)
        if count > most:
            raise ValueError(f"it claims {count:,} {what}")
        return count

    def _number(self, width: int) -> int:
        place = self._place
        self._skip(width)
        number: int = struct.unpack_from("<I" if width == 4 else "<Q", self._content, place)[0]
        return number

    def _skip(self, num_bytes: int) -> None:
        self._place += num_bytes
        if self._place > len(self._content):
            raise ValueError(f"truncated: it ends after {len(self._content):,} bytes, inside its header")
